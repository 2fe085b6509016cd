"""The exchange in rounds: what all methods that send each message to its own rank have in common.

Every rank queues its messages by destination. In each round it sends up to `rows` of each queue, the experts
run, results return, until no rank has anything left. Nothing is dropped; the number of rounds is an output.
`rows` at the worst case (`worst_case_rows`, the paper's `max_tokens`) makes it one round always.

How messages lie while they travel, and what moves them, is a method's `Travel`.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Float, Int, Shaped

from cmx_jax.mesh.exchange.message import Wire, pack

Axis = str | tuple[str, ...]
ExpertFn = Callable[[Shaped[Array, "N M"], Int[Array, " N"], Wire], Float[Array, "N D"]]
"""Received rows, the local expert slot of each (-1: empty row), and how rows are read, to the results."""


class Route(NamedTuple):
    """One round's way out and back.

    Attributes:
      start: where in the outbox the messages for each rank begin.
      size: rows of the outbox.
      out: takes the outbox `[size, M]` to what a rank receives `[N, M]`; rows that hold no message are zeros.
      back: takes received rows' results `[N, D]` to the outbox rows `[size, D]` that they answer; the others
        may hold anything.
    """

    start: Int[Array, " G"]
    size: int
    out: Callable[[Shaped[Array, "S M"]], Shaped[Array, "N M"]]
    back: Callable[[Float[Array, "N D"]], Float[Array, "S D"]]


Travel = Callable[[Int[Array, " G"], int, int, Axis], Route]
"""Messages for each rank in a round, `rows` that they are at most, messages of a rank in all rounds, axis."""


@struct.dataclass
class ExchangeStats:
    """What one exchange did on this rank. Scalars; the runners stack them over ranks."""

    rounds: Any  # [] int32
    sent: Any  # [] int32: messages this rank sent, to its own experts included
    received: Any  # [] int32: messages that this rank's experts answered


def worst_case_rows(tokens: int, top_k: int, slots_per_rank: int) -> int:
    """Rows that one peer can ever need: `local_batch x min(top_k, experts_per_rank)` (section 4.2.1).

    That holds because the slots of a token are all different.
    """
    return tokens * min(top_k, slots_per_rank)


def usual_rows(tokens: int, top_k: int, slots_per_rank: int, ranks: int) -> int:
    """Twice the mean load of a peer plus two, at most the worst case."""
    mean = -(-tokens * top_k // ranks)
    return min(worst_case_rows(tokens, top_k, slots_per_rank), 2 * mean + 2)


class _Queues(NamedTuple):
    """Where each message goes: destination rank (G: nowhere), its turn in that rank's queue, the lengths."""

    rank: Int[Array, " M"]
    turn: Int[Array, " M"]
    lengths: Int[Array, " G"]


FEW = 1 << 14  # comparisons that cost less than the operations of a sort or a histogram, on CPU


def occurrences(keys: Int[Array, " N"], bins: int) -> Int[Array, " B"]:
    """How often each key in `[0, bins)` is there."""
    if keys.shape[0] * bins <= FEW:
        return jnp.sum(keys[:, None] == jnp.arange(bins, dtype=keys.dtype)[None], axis=0, dtype=jnp.int32)
    return jnp.bincount(keys, length=bins).astype(jnp.int32)


def stable_order(keys: Int[Array, " N"], bins: int) -> Int[Array, " N"]:
    """The stable argsort of keys in `[0, bins)`. Where key and place fit one number, that alone is sorted:
    XLA:CPU calls a comparison of its own making for every pair of a sort with two operands."""
    rows = keys.shape[0]
    if bins * rows >= 1 << 31:
        return jnp.argsort(keys, stable=True).astype(jnp.int32)
    place = jnp.arange(rows, dtype=jnp.int32)
    return jax.lax.sort(keys.astype(jnp.int32) * rows + place, is_stable=False) % rows


def turns(keys: Int[Array, " M"], bins: int) -> tuple[Int[Array, " M"], Int[Array, " B"]]:
    """How many equal keys stand before each, and how often each key in `[0, bins)` is there."""
    counts, place = occurrences(keys, bins), jnp.arange(keys.shape[0], dtype=jnp.int32)
    if keys.shape[0] ** 2 <= FEW:
        before = (keys[:, None] == keys[None]) & (place[None] < place[:, None])
        return jnp.sum(before, axis=1, dtype=jnp.int32), counts
    order = stable_order(keys, bins)
    start = jnp.cumsum(counts) - counts
    place = jnp.zeros_like(place).at[order].set(place)
    return place - start[keys], counts


def _queue(slots: Int[Array, " M"], slots_per_rank: int, ranks: int) -> _Queues:
    """Queues messages by destination, in the order of their tokens."""
    rank = jnp.where(slots < 0, ranks, slots // slots_per_rank)
    turn, counts = turns(rank, ranks + 1)
    return _Queues(rank, turn, counts[:ranks])


def drained(
    x: Float[Array, "T D"],
    slots: Int[Array, "T K"],
    weights: Float[Array, "T K"],
    experts: ExpertFn,
    *,
    axis: Axis,
    slots_per_rank: int,
    rows: int,
    wire: str,
    travel: Travel,
) -> tuple[Float[Array, "T D"], ExchangeStats]:
    """Messages out, experts, results back, round by round.

    Args:
      x: this rank's tokens.
      slots: for each token its global expert slots, all different; -1 sends nothing.
      weights: what each expert's answer counts for.
      experts: the local experts.
      axis: mesh axis (or axes) of the expert-parallel ranks.
      slots_per_rank: rank `r` owns slots `[r * slots_per_rank, (r + 1) * slots_per_rank)`.
      rows: messages for each peer in a round.
      wire: type on the way out; the way back is `x.dtype`, or bfloat16 for `int8` and `bfloat16`.
      travel: the messages' way there and back.

    Returns:
      `sum_k weights[t, k] * expert_{slots[t, k]}(x[t])`, summed in float32 in the order of `k`, so
      that neither rounds nor ranks change the result; and the stats.
    """
    ranks = jax.lax.axis_size(axis)
    (tokens, top_k), width = slots.shape, x.shape[-1]
    messages, flat_slots = tokens * top_k, slots.reshape(-1)
    copies = jnp.broadcast_to(x[:, None], (tokens, top_k, width)).reshape(messages, width)
    queues = _queue(flat_slots, slots_per_rank, ranks)
    read, back = Wire(width, wire, x.dtype), x.dtype if wire == "float32" else jnp.dtype(jnp.bfloat16)

    def one_round(turn: Int[Array, ""] | int, carry: tuple[Array, Array]) -> tuple[Array, Array]:
        results, count = carry
        with jax.named_scope("Dispatch"):
            route = travel(jnp.clip(queues.lengths - turn * rows, 0, rows), rows, messages, axis)
            row = queues.turn - turn * rows
            here = (row >= 0) & (row < rows) & (queues.rank < ranks)
            place = jnp.where(here, route.start[queues.rank] + row, route.size)
            packed = pack(copies, flat_slots % slots_per_rank, here, wire)
            mail = jnp.zeros((route.size, packed.shape[1]), packed.dtype)
            received = route.out(mail.at[place].set(packed, mode="drop", unique_indices=True))
            local = read.slots(received)
        answers = experts(received, local, read).astype(back)
        with jax.named_scope("Combine"):
            answers = route.back(answers)[jnp.where(here, place, 0)].astype(x.dtype)
        results = jnp.where(here[:, None], answers, results)
        return results, count + jnp.sum(local >= 0).astype(jnp.int32)

    start = jnp.zeros((messages, width), x.dtype), jnp.zeros((), jnp.int32)
    if rows >= worst_case_rows(tokens, top_k, slots_per_rank):
        rounds = jnp.ones((), jnp.int32)
        results, answered = one_round(0, start)
    else:  # every rank must take part in every round, so all agree on their number first
        rounds = jax.lax.pmax(-(-jnp.max(queues.lengths) // rows), axis).astype(jnp.int32)
        results, answered = jax.lax.fori_loop(0, rounds, one_round, start)
    used = jnp.where(slots < 0, 0.0, weights)
    answers = results.reshape(tokens, top_k, width).astype(jnp.float32)
    y = jnp.einsum("tk,tkd->td", used, answers, precision="highest").astype(x.dtype)
    return y, ExchangeStats(rounds, jnp.sum(flat_slots >= 0).astype(jnp.int32), answered)
