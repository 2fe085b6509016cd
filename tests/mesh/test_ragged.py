"""The ragged exchange, on which only real messages travel, equals the mailbox exchange bit for bit.

XLA has no ragged all-to-all for CPU. Here an emulation replaces it, which returns garbage where the
documentation leaves the result undefined. Buffers that are not cleared hold garbage, too.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from cmx_jax.errors import CmxError
from cmx_jax.mesh import Abstract, Runner, make_runner
from cmx_jax.mesh.exchange import WIRES, Axis, ExchangeArgs, exchange, message_bytes
from cmx_jax.model.steps import check_ragged
from mesh.coded import (
    TOKENS,
    TOP_K,
    WORST,
    Routing,
    by_hand,
    coded,
    holes,
    likely,
    longest_queue,
    no_messages,
    one_expert,
    one_rank,
    program,
    uniform,
    zipf,
)


def garbage(shape: tuple[int, ...], dtype: Any) -> jax.Array:
    return jnp.full(shape, jnp.nan if jnp.issubdtype(dtype, jnp.floating) else 77, dtype)


def emulated(
    operand: jax.Array,
    output: jax.Array,
    input_offsets: jax.Array,
    send_sizes: jax.Array,
    output_offsets: jax.Array,
    recv_sizes: jax.Array,
    *,
    axis_name: Axis,
) -> jax.Array:
    """Emulates `jax.lax.ragged_all_to_all`: every rank gathers all messages and takes those for it."""
    ranks, me = jax.lax.axis_size(axis_name), jax.lax.axis_index(axis_name)

    def gathered(x: jax.Array) -> jax.Array:
        parts = x
        for name in reversed((axis_name,) if isinstance(axis_name, str) else axis_name):
            parts = jax.lax.all_gather(parts, name)
        return parts.reshape(ranks, *x.shape)

    first, size, to = (gathered(x)[:, me, None] for x in (input_offsets, send_sizes, output_offsets))
    data, step = gathered(operand), jnp.arange(len(operand))[None]
    target = jnp.where(step < size, to + step, len(output)).reshape(-1)
    rows = jnp.take_along_axis(data, ((first + step) % len(operand))[:, :, None], axis=1)
    result = output.at[target].set(rows.reshape(-1, operand.shape[1]), mode="drop")
    writes = jnp.zeros(len(output) + 1, jnp.int32).at[target].add(1)[:-1]
    defined = (
        jnp.array_equal(recv_sizes, size[:, 0])
        & jnp.all((first >= 0) & (first + size <= len(operand)) & (to >= 0) & (to + size <= len(output)))
        & jnp.all(writes <= 1)
    )
    return jnp.where(defined, result, garbage(result.shape, result.dtype))


@pytest.fixture
def on_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jax.lax, "ragged_all_to_all", emulated)
    monkeypatch.setattr(jax.lax, "empty", garbage)


@pytest.mark.parametrize("kind", ["lanes", "devices"])
def test_emulation_follows_the_documentation_of_jax(kind: str) -> None:
    """The documentation's own example, on an axis of size 2."""

    def rank(*args: jax.Array) -> jax.Array:
        return emulated(*args, axis_name="ep")

    args = (
        np.array([1, 2, 2, 3, 4, 0], np.int32)[:, None],
        np.zeros((8, 1), np.int32),
        *np.array([[0, 1, 0, 1], [1, 2, 1, 1], [0, 0, 1, 2], [1, 1, 2, 1]], np.int32),
    )
    result = make_runner(kind, (("ep", 2),)).jit(rank, (P("ep"),) * 6, P("ep"))(*args)
    np.testing.assert_array_equal(result[:, 0], [1, 3, 0, 0, 2, 2, 4, 0])


@pytest.mark.usefixtures("on_cpu")
@pytest.mark.parametrize("routing", [uniform, zipf, holes, one_expert, one_rank, no_messages])
@pytest.mark.parametrize("rows", [1, 2, WORST])
@pytest.mark.parametrize(("kind", "ranks", "slots_per_rank"), [("lanes", 8, 4), ("devices", 6, 1)])
@pytest.mark.slow
def test_ragged_results_are_exact(
    kind: str, ranks: int, slots_per_rank: int, rows: int, routing: Routing
) -> None:
    """Messages reach their experts and return in as many rounds as the longest queue needs."""
    slots = routing(ranks, slots_per_rank, np.random.default_rng(0))
    x, weights = coded(slots, ranks)
    run = program(kind, (("ep", ranks),), "ep", slots_per_rank, rows, "ragged")
    y, rounds, sent = run(x, slots, weights)
    np.testing.assert_array_equal(y, by_hand(x, slots, weights))
    np.testing.assert_array_equal(sent, (slots >= 0).reshape(ranks, -1).sum(1))
    needed = 1 if rows == WORST else -(-longest_queue(slots, ranks, slots_per_rank) // rows)
    assert set(np.asarray(rounds).tolist()) == {needed}


@pytest.mark.usefixtures("on_cpu")
@pytest.mark.parametrize(("wire", "rows"), list(zip(WIRES, [2, WORST, 1], strict=True)))
@pytest.mark.slow
def test_ragged_equals_mailboxes_on_any_wire(wire: str, rows: int) -> None:
    rng = np.random.default_rng(2)
    slots = likely(8, 4, rng, 0.5)
    slots[rng.random(slots.shape) < 0.2] = -1
    x, weights = (rng.normal(size=(len(slots), n)).astype(np.float32) for n in (64, TOP_K))
    mailboxes, messages = (
        program("devices", (("ep", 8),), "ep", 4, rows, method, wire)(x, slots, weights)
        for method in ("flat", "ragged")
    )
    for ours, theirs in zip(messages, mailboxes, strict=True):
        np.testing.assert_array_equal(ours, theirs)


@pytest.mark.usefixtures("on_cpu")
@pytest.mark.parametrize(("kind", "axis"), [("devices", ("node", "npu")), ("lanes", ("npu", "node"))])
def test_two_axes_in_either_order(kind: str, axis: tuple[str, str]) -> None:
    """The ranks of two mesh axes are numbered as one line."""
    slots = holes(8, 4, np.random.default_rng(1))
    x, weights = coded(slots, 8)
    y, rounds, _ = program(kind, (("node", 4), ("npu", 2)), axis, 4, 1, "ragged")(x, slots, weights)
    np.testing.assert_array_equal(y, by_hand(x, slots, weights))
    assert set(np.asarray(rounds).tolist()) == {longest_queue(slots, 8, 4)}


@pytest.mark.usefixtures("on_cpu")
def test_groups_of_ranks_have_rounds_of_their_own() -> None:
    busy, idle = one_rank(4, 2, np.random.default_rng(0)), no_messages(4, 2, np.random.default_rng(0))
    slots = np.concatenate([idle, busy])
    x, weights = coded(slots, 8)
    y, rounds, _ = program("lanes", (("dp", 2), ("ep", 4)), "ep", 2, 1, "ragged")(x, slots, weights)
    np.testing.assert_array_equal(y, by_hand(x, slots, weights))
    assert np.asarray(rounds).tolist() == [0] * 4 + [TOKENS * TOP_K] * 4


def lowered(axes: tuple[tuple[str, int], ...], axis: tuple[str, ...], wire: str) -> str:
    """Lowers an exchange for TPU: 96 tokens of width 7,168 per rank, top-8, 2 experts per rank."""
    runner, spec = Abstract(axes), P(axis)

    def rank(x: jax.Array, slots: jax.Array, weights: jax.Array) -> jax.Array:
        args = ExchangeArgs(axis, slots_per_rank=2, rows=12, wire=wire)
        return exchange("ragged")(x, slots, weights, lambda received, _, read: read.tokens(received), args)[0]

    tokens = 96 * runner.mesh.size
    shapes = (((tokens, 7168), jnp.bfloat16), ((tokens, 8), jnp.int32), ((tokens, 8), jnp.float32))
    args = [runner.make(shape, dtype, spec) for shape, dtype in shapes]
    return runner.jit(rank, (spec,) * 3, spec).trace(*args).lower(lowering_platforms=("tpu",)).as_text()


@pytest.mark.parametrize(("wire", "element"), [("bfloat16", "bf16"), ("int8", "i8")])
def test_ragged_lowers_for_tpu_to_messages(wire: str, element: str) -> None:
    """A rank sends up to 96 x 8 messages and receives up to 160 x 12, by one operation in each direction."""
    text = lowered((("ep", 160),), ("ep",), wire)
    calls = [line for line in text.splitlines() if "@ragged_all_to_all" in line]
    width = message_bytes(7168, wire) // jnp.dtype(wire).itemsize
    out, back = (line.rpartition(" : (")[2] for line in calls)
    assert out.startswith(f"tensor<768x{width}x{element}>, tensor<1920x{width}x{element}>, tensor<160xi32>")
    assert back.startswith("tensor<1920x7168xbf16>, tensor<768x7168xbf16>, tensor<160xi32>")


@pytest.mark.parametrize(
    ("axis", "first"), [(("node", "npu"), "[[0, 1, 2, 3, 4, 5]]"), (("npu", "node"), "[[0, 2, 4, 1, 3, 5]]")]
)
def test_replica_groups_of_two_axes(axis: tuple[str, str], first: str) -> None:
    text = lowered((("node", 3), ("npu", 2)), axis, "bfloat16")
    calls = [line for line in text.splitlines() if "@ragged_all_to_all" in line]
    assert len(calls) == 2
    assert all(f"replica_groups = dense<{first}>" in line for line in calls)


@pytest.mark.parametrize("kind", ["lanes", "devices"])
def test_ragged_is_refused_on_cpu_and_lanes(kind: str) -> None:
    runner: Runner = make_runner(kind, (("ep", 2),))
    place = {"lanes": "between lanes", "devices": "on CPU"}[kind]
    with pytest.raises(CmxError, match=rf"^exchange 'ragged' does not run {place}: .*\Z"):
        check_ragged("ragged", runner)
    check_ragged("flat", runner)
    check_ragged("ragged", Abstract((("ep", 2),)))
