"""Messages of one round: rows that arrive, their type and their bytes."""

import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from cmx_jax.mesh import Abstract, Lanes, Runner, make_runner
from cmx_jax.mesh.exchange import WIRES, ExchangeArgs, Wire, exchange, message_bytes, worst_case_rows

RANKS, TOKENS, TOP_K, WIDTH = 8, 3, 2, 16
RESULT_BYTES = {"float32": 4, "bfloat16": 2, "int8": 2}


@functools.cache
def one_round(wire: str, slots_per_rank: int, runner: Runner) -> Callable[..., tuple[jax.Array, ...]]:
    """Compiles one round with experts that return their input.

    The program maps tokens and slots to results and the rows and slots that each rank received.
    """

    def rank(x: jax.Array, slots: jax.Array) -> tuple[jax.Array, ...]:
        arrived: list[jax.Array] = []

        def experts(received: jax.Array, local: jax.Array, read: Wire) -> jax.Array:
            tokens = read.tokens(received)
            arrived.extend((tokens[None], local[None]))
            return tokens

        weights, rows = jnp.ones(slots.shape), worst_case_rows(*slots.shape, slots_per_rank)
        y, _ = exchange("flat")(x, slots, weights, experts, ExchangeArgs("ep", slots_per_rank, rows, wire))
        return y, *arrived

    return runner.jit(rank, (P("ep"),) * 2, (P("ep"),) * 3)


def deliver(
    x: np.ndarray, slots: np.ndarray, wire: str, slots_per_rank: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns results `[T, D]`, and for `[receiver, sender]` the rows `[rows, D]` and their local slots."""
    ranks = len(slots) // TOKENS
    y, received, local = one_round(wire, slots_per_rank, Lanes((("ep", ranks),)))(x, slots)
    boxes = (ranks, ranks, -1)
    return np.asarray(y), np.asarray(received).reshape(*boxes, x.shape[1]), np.asarray(local).reshape(boxes)


def distinct_slots() -> np.ndarray:
    """Routes to two slots on each rank.

    No two messages of a rank share a slot; the last token of a rank chooses only one slot.
    """
    first = np.arange(RANKS * TOKENS) * TOP_K
    slots = (np.stack([first, first + 1], 1) * 3 % (2 * RANKS)).astype(np.int32)
    slots[TOKENS - 1 :: TOKENS, 1] = -1
    return slots


def tokens() -> np.ndarray:
    x = np.random.default_rng(0).normal(size=(RANKS * TOKENS, WIDTH)).astype(np.float32)
    return x * 10.0 ** np.arange(-3, 3).repeat(4)[:, None].astype(np.float32)


def arrivals(x: np.ndarray, slots: np.ndarray, wire: str) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yields each message as it was sent and as it arrived."""
    _, received, local = deliver(x, slots, wire, 2)
    for t, k in np.argwhere(slots >= 0):
        receiver, sender = slots[t, k] // 2, t // TOKENS
        [row] = np.argwhere(local[receiver, sender] == slots[t, k] % 2)[0]
        yield x[t], received[receiver, sender, row]


@pytest.mark.parametrize("wire", WIRES)
def test_mailbox_holds_its_messages_and_empty_rows(wire: str) -> None:
    slots = distinct_slots()
    _, _, local = deliver(tokens(), slots, wire, 2)
    assert local.shape == (RANKS, RANKS, TOKENS * TOP_K)
    for receiver, sender in np.ndindex(RANKS, RANKS):
        sent = slots[sender * TOKENS : (sender + 1) * TOKENS].reshape(-1)
        expected = sorted(sent[(sent >= 0) & (sent // 2 == receiver)] % 2)
        empty = TOKENS * TOP_K - len(expected)
        assert sorted(local[receiver, sender]) == [-1] * empty + expected


@pytest.mark.parametrize("wire", ["float32", "bfloat16"])
def test_float_tokens_arrive_rounded_to_the_wire(wire: str) -> None:
    for sent, arrived in arrivals(tokens(), distinct_slots(), wire):
        np.testing.assert_array_equal(arrived, sent.astype(jnp.dtype(wire)).astype(np.float32))


def test_int8_tokens_arrive_within_half_a_scale() -> None:
    for sent, arrived in arrivals(tokens(), distinct_slots(), "int8"):
        scale = np.abs(sent).max() / 127
        assert (np.abs(sent - arrived) <= scale * 0.5001).all()


@pytest.mark.parametrize("wire", ["bfloat16", "int8"])
def test_results_return_in_bfloat16_and_are_summed_in_float32(wire: str) -> None:
    x, slots = tokens(), distinct_slots()
    y, received, local = deliver(x, slots, wire, 2)
    for t in range(len(x)):
        box = (slots[t, 0] // 2, t // TOKENS)
        answer = received[box][local[box] == slots[t, 0] % 2][0].astype(jnp.bfloat16).astype(np.float32)
        np.testing.assert_array_equal(y[t], answer * np.float32((slots[t] >= 0).sum()))


@pytest.mark.parametrize("wire", WIRES)
def test_devices_and_lanes_are_equal(wire: str) -> None:
    lanes, devices = (make_runner(kind, (("ep", RANKS),)) for kind in ("lanes", "devices"))
    for a, b in zip(
        *(one_round(wire, 2, r)(tokens(), distinct_slots()) for r in (lanes, devices)), strict=True
    ):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("wire", ["float32", "bfloat16"])
def test_bfloat16_tokens_cross_a_float_wire_unchanged(wire: str) -> None:
    x, slots = tokens().astype(jnp.bfloat16), distinct_slots()
    y, *_ = deliver(x, slots, wire, 2)
    assert y.dtype == jnp.bfloat16
    np.testing.assert_array_equal(y.astype(np.float32), x.astype(np.float32) * (slots >= 0).sum(1)[:, None])


@pytest.mark.parametrize("wire", WIRES)
def test_inactive_and_zero_tokens_do_not_change_others(wire: str) -> None:
    x, slots = tokens(), distinct_slots()
    clean, *_ = deliver(x, slots, wire, 2)
    inactive, zero = np.arange(len(x)) % 4 == 1, np.arange(len(x)) % 4 == 2
    slots[inactive], x[inactive], x[zero] = -1, np.nan, 0
    y, *_ = deliver(x, slots, wire, 2)
    np.testing.assert_array_equal(y, np.where((inactive | zero)[:, None], 0, clean))


@pytest.mark.parametrize("wire", WIRES)
def test_slot_numbers_with_hundreds_of_slots_per_rank(wire: str) -> None:
    slots = np.array([[0, 126], [127, 128], [254, 255], [256, 257], [299, 300], [427, 599]], np.int32)
    _, _, local = deliver(np.ones((6, 4), np.float32), slots, wire, 300)
    for receiver, sender in np.ndindex(2, 2):
        sent = slots[sender * TOKENS : (sender + 1) * TOKENS].reshape(-1)
        arrived = local[receiver, sender]
        assert sorted(arrived[arrived >= 0]) == sorted(sent[sent // 300 == receiver] % 300)


@pytest.mark.parametrize(
    ("wire", "expected"), [("float32", 4 * (7168 + 2)), ("bfloat16", 2 * (7168 + 2)), ("int8", 7168 + 4 + 2)]
)
def test_message_bytes(wire: str, expected: int) -> None:
    """A message is its token, its scale and two digits."""
    assert message_bytes(7168, wire) == expected


def all_to_alls(jaxpr: Any) -> Iterator[Any]:
    """Yields the operands of a program's all-to-alls, in their order."""
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "all_to_all":
            yield eqn.invars[0].aval
        for inner in eqn.params.values():
            if hasattr(inner, "eqns"):
                yield from all_to_alls(inner)


@pytest.mark.parametrize("wire", WIRES)
def test_bytes_of_the_all_to_alls(wire: str) -> None:
    """The whole mailbox crosses the wire as messages, and back as results."""
    runner = Abstract((("ep", 384),))
    shapes = (
        jax.ShapeDtypeStruct((384 * TOKENS, 7168), jnp.float32),
        jax.ShapeDtypeStruct((384 * TOKENS, TOP_K), jnp.int32),
    )
    traced = one_round(wire, 2, runner).trace(*runner.put(shapes, (P("ep"), P("ep"))))
    out, back = (mail.size * mail.dtype.itemsize for mail in all_to_alls(traced.jaxpr))
    rows = 384 * TOKENS * TOP_K
    assert (out, back) == (rows * message_bytes(7168, wire), rows * 7168 * RESULT_BYTES[wire])
