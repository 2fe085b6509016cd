"""Tokens that carry their rank and index, experts that stamp their slot: a misrouted token shows exactly.

Experts answer NaN to every empty row and inactive tokens hold NaN, so that none of it may reach a result.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from jax.sharding import PartitionSpec as P

from cmx_jax.errors import CmxError
from cmx_jax.mesh import make_runner
from cmx_jax.mesh.exchange import EXCHANGES, Axis, exchange, worst_case_rows

TOKENS, TOP_K = 3, 2  # of each rank
WORST = 0  # rows: as many as a peer can ever need

Routing = Callable[[int, int, np.random.Generator], np.ndarray]


@functools.cache
def program(
    kind: str,
    axes: tuple[tuple[str, int], ...],
    over: Axis,
    slots_per_rank: int,
    rows: int,
    method: str = "flat",
) -> Callable[..., tuple[jax.Array, jax.Array, jax.Array]]:
    """Tokens, slots and weights of all ranks -> results, and each rank's rounds and messages sent."""
    names = (over,) if isinstance(over, str) else over
    spec = P((*(name for name, _ in axes if name not in names), *names))

    def rank(x: jax.Array, slots: jax.Array, weights: jax.Array) -> tuple[jax.Array, ...]:
        first = jax.lax.axis_index(over) * slots_per_rank
        worst = worst_case_rows(*slots.shape, slots_per_rank)

        def experts(received: jax.Array, local: jax.Array) -> jax.Array:
            stamped = received * (first + local + 1).astype(received.dtype)[:, None]
            return jnp.where(local[:, None] < 0, jnp.nan, stamped)

        send = functools.partial(exchange(method), axis=over, slots_per_rank=slots_per_rank, wire="float32")
        y, stats = send(x, slots, weights, experts, rows=worst if rows == WORST else rows)
        return y, stats.rounds[None], stats.sent[None]

    return make_runner(kind, axes).jit(rank, (spec,) * 3, (spec,) * 3)


def by_hand(x: np.ndarray, slots: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """What `program` computes."""
    y = np.zeros_like(x)
    for t, k in np.argwhere(slots >= 0):
        y[t] += weights[t, k] * (x[t] * (slots[t, k] + 1))
    return y


def longest_queue(slots: np.ndarray, ranks: int, slots_per_rank: int) -> int:
    """The most messages that any rank has for any rank."""
    counts = np.zeros((ranks, ranks), int)
    for t, k in np.argwhere(slots >= 0):
        counts[t // (len(slots) // ranks), slots[t, k] // slots_per_rank] += 1
    return counts.max()


def coded(slots: np.ndarray, ranks: int) -> tuple[np.ndarray, np.ndarray]:
    """Tokens `[source rank + 1, index + 1, 1]` (NaN where inactive) and small whole weights."""
    t = np.arange(len(slots))
    per_rank = len(slots) // ranks
    x = np.stack([t // per_rank + 1, t % per_rank + 1, np.ones_like(t)], 1).astype(np.float32)
    x[(slots < 0).all(1)] = np.nan
    return x, (1 + np.add.outer(t, 2 * np.arange(slots.shape[1])) % 3).astype(np.float32)


def likely(ranks: int, slots_per_rank: int, rng: np.random.Generator, skew: float) -> np.ndarray:
    """Distinct slots for each token, slot `s` as likely as `(s + 1) ** -skew`."""
    total = ranks * slots_per_rank
    chance = rng.gumbel(size=(ranks * TOKENS, total)) - skew * np.log(np.arange(total) + 1)
    return np.argsort(-chance, axis=1)[:, :TOP_K].astype(np.int32)


def uniform(ranks: int, slots_per_rank: int, rng: np.random.Generator) -> np.ndarray:
    return likely(ranks, slots_per_rank, rng, 0.0)


def zipf(ranks: int, slots_per_rank: int, rng: np.random.Generator) -> np.ndarray:
    return likely(ranks, slots_per_rank, rng, 1.5)


def holes(ranks: int, slots_per_rank: int, rng: np.random.Generator) -> np.ndarray:
    slots = zipf(ranks, slots_per_rank, rng)
    slots[::2] = -1  # inactive tokens
    slots[rng.random(slots.shape) < 0.3] = -1
    return slots


def one_expert(ranks: int, slots_per_rank: int, rng: np.random.Generator) -> np.ndarray:
    return np.tile(np.array([ranks * slots_per_rank - 1, -1], np.int32), (ranks * TOKENS, 1))


def one_rank(ranks: int, slots_per_rank: int, rng: np.random.Generator) -> np.ndarray:
    choices = [ranks // 2 * slots_per_rank + k if k < slots_per_rank else -1 for k in range(TOP_K)]
    return np.tile(np.array(choices, np.int32), (ranks * TOKENS, 1))


def nobody(ranks: int, slots_per_rank: int, rng: np.random.Generator) -> np.ndarray:
    return np.full((ranks * TOKENS, TOP_K), -1, np.int32)


@pytest.mark.parametrize("routing", [uniform, zipf, holes, one_expert, one_rank, nobody])
@pytest.mark.parametrize("rows", [1, 2, WORST])
@pytest.mark.parametrize(
    ("kind", "ranks", "slots_per_rank"),
    [
        *(("lanes", 8, 4), ("lanes", 320, 1), ("lanes", 384, 2)),
        *(("devices", 8, 4), ("devices", 16, 1), ("devices", 160, 2)),
    ],
)
def test_tokens_return_from_their_experts_in_the_rounds_of_the_longest_queue(
    kind: str, ranks: int, slots_per_rank: int, rows: int, routing: Routing
) -> None:
    slots = routing(ranks, slots_per_rank, np.random.default_rng(0))
    x, weights = coded(slots, ranks)
    y, rounds, sent = program(kind, (("ep", ranks),), "ep", slots_per_rank, rows)(x, slots, weights)
    np.testing.assert_array_equal(y, by_hand(x, slots, weights))
    np.testing.assert_array_equal(sent, (slots >= 0).reshape(ranks, -1).sum(1))
    needed = 1 if rows == WORST else -(-longest_queue(slots, ranks, slots_per_rank) // rows)
    assert set(np.asarray(rounds).tolist()) == {needed}


def test_runners_and_rounds_change_no_bit_of_a_sum() -> None:
    rng = np.random.default_rng(0)
    slots = np.argsort(rng.random((8 * TOKENS, 8 * 2)), axis=1)[:, :8].astype(np.int32)
    x, weights = (rng.normal(size=(len(slots), n)).astype(np.float32) for n in (64, 8))
    results = [
        np.asarray(program(kind, (("ep", 8),), "ep", 2, rows)(x, slots, weights)[0])
        for kind in ("lanes", "devices")
        for rows in (1, WORST)
    ]
    np.testing.assert_allclose(results[0], by_hand(x, slots, weights), rtol=1e-5, atol=1e-4)
    for other in results[1:]:
        np.testing.assert_array_equal(other, results[0])


@pytest.mark.parametrize("kind", ["lanes", "devices"])
@pytest.mark.parametrize("method", EXCHANGES)
@pytest.mark.parametrize("over", [("node", "npu"), ("npu", "node")])
def test_two_axes_in_either_order_are_one_line_of_ranks(
    kind: str, method: str, over: tuple[str, str]
) -> None:
    slots = holes(8, 4, np.random.default_rng(1))
    x, weights = coded(slots, 8)
    y, rounds, _ = program(kind, (("node", 4), ("npu", 2)), over, 4, 1, method)(x, slots, weights)
    np.testing.assert_array_equal(y, by_hand(x, slots, weights))
    assert set(np.asarray(rounds).tolist()) == {1 if method == "allgather" else longest_queue(slots, 8, 4)}


@pytest.mark.parametrize("routing", [uniform, zipf, holes, one_expert, one_rank, nobody])
@pytest.mark.parametrize(
    ("kind", "ranks", "slots_per_rank"),
    [("lanes", 8, 4), ("lanes", 384, 2), ("devices", 8, 1), ("devices", 160, 2)],
)
def test_gathered_tokens_give_the_same_in_one_round(
    kind: str, ranks: int, slots_per_rank: int, routing: Routing
) -> None:
    slots = routing(ranks, slots_per_rank, np.random.default_rng(0))
    x, weights = coded(slots, ranks)
    unused = np.where(slots < 0, np.float32(np.nan), weights)
    y, rounds, sent = program(kind, (("ep", ranks),), "ep", slots_per_rank, 1, "allgather")(x, slots, unused)
    np.testing.assert_array_equal(y, by_hand(x, slots, weights))
    np.testing.assert_array_equal(sent, (slots >= 0).reshape(ranks, -1).sum(1))
    assert set(np.asarray(rounds).tolist()) == {1}


@pytest.mark.parametrize("routing", [zipf, holes, one_expert, one_rank])
@pytest.mark.parametrize(("kind", "nodes"), [("lanes", 48), ("devices", 20)])
def test_the_hierarchical_exchange_of_an_instance_is_exact(kind: str, nodes: int, routing: Routing) -> None:
    """The whole supernode as lanes, the decode instance as devices: 8 NPUs a node."""
    slots = routing(8 * nodes, 2, np.random.default_rng(0))
    x, weights = coded(slots, 8 * nodes)
    axes = (("node", nodes), ("npu", 8))
    y, rounds, sent = program(kind, axes, ("node", "npu"), 2, 1, "hierarchical")(x, slots, weights)
    np.testing.assert_array_equal(y, by_hand(x, slots, weights))
    np.testing.assert_array_equal(sent, (slots >= 0).reshape(8 * nodes, -1).sum(1))
    assert set(np.asarray(rounds).tolist()) == {longest_queue(slots, 8 * nodes, 2)}


@pytest.mark.parametrize("kind", ["lanes", "devices"])
def test_groups_beside_each_other_drain_for_themselves(kind: str) -> None:
    busy, idle = one_rank(4, 2, np.random.default_rng(0)), nobody(4, 2, np.random.default_rng(0))
    slots = np.concatenate([idle, busy])
    x, weights = coded(slots, 8)
    y, rounds, _ = program(kind, (("dp", 2), ("ep", 4)), "ep", 2, 1)(x, slots, weights)
    np.testing.assert_array_equal(y, by_hand(x, slots, weights))
    assert np.asarray(rounds).tolist() == [0] * 4 + [TOKENS * TOP_K] * 4


@pytest.mark.parametrize("rows", [1, WORST])
def test_the_weight_of_a_slot_that_is_not_used_does_not_matter(rows: int) -> None:
    slots = holes(8, 4, np.random.default_rng(0))
    x, weights = coded(slots, 8)
    unused = np.where(slots < 0, np.float32(np.nan), weights)
    y, *_ = program("lanes", (("ep", 8),), "ep", 4, rows)(x, slots, unused)
    np.testing.assert_array_equal(y, by_hand(x, slots, weights))


@given(st.sampled_from([(1, 2, 3, 2, 1), (3, 1, 2, 2, 1), (4, 2, 3, 3, 2), (5, 3, 4, 2, WORST)]), st.data())
@settings(deadline=None, max_examples=150)
def test_any_routing_is_exact(shape: tuple[int, int, int, int, int], data: st.DataObject) -> None:
    ranks, slots_per_rank, tokens, top_k, rows = shape
    choices = st.integers(-1, ranks * slots_per_rank - 1)
    slots = data.draw(hnp.arrays(np.int32, (ranks * tokens, top_k), elements=choices))
    for k in range(1, top_k):  # a token chooses an expert once
        slots[(slots[:, k : k + 1] == slots[:, :k]).any(1), k] = -1
    numbers = st.integers(-100, 100).map(float)
    x = data.draw(hnp.arrays(np.float32, (len(slots), 2), elements=numbers))
    x[(slots < 0).all(1)] = np.nan
    weights = data.draw(hnp.arrays(np.float32, slots.shape, elements=numbers))
    y, rounds, sent = program("lanes", (("ep", ranks),), "ep", slots_per_rank, rows)(x, slots, weights)
    np.testing.assert_array_equal(y, by_hand(x, slots, weights))
    np.testing.assert_array_equal(sent, (slots >= 0).reshape(ranks, -1).sum(1))
    longest = longest_queue(slots, ranks, slots_per_rank)
    assert longest <= worst_case_rows(tokens, top_k, slots_per_rank)
    assert set(np.asarray(rounds).tolist()) == {1 if rows == WORST else -(-longest // rows)}


def test_an_unknown_method_is_refused() -> None:
    with pytest.raises(CmxError, match="exchange 'post' is unknown, expected one of"):
        exchange("post")
