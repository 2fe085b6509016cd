"""The token exchange: dispatch tokens to the ranks of their experts, combine what comes back.

The paper's FusedDispatch and FusedCombine (section 4.2.1) write each message straight into a
preallocated slot of the peer's memory. An XLA all-to-all moves the whole mailbox instead, so here
the mailbox `[G, rows, message]` is sized for the usual load and **drained in rounds**: every rank
sends up to `rows` messages to every peer, the experts run, results return, until no rank has
anything left. Nothing is dropped; the number of rounds is an output. `rows` at the worst case
(`worst_case_rows`, the paper's `max_tokens`) makes it one round always.

One message is one copy of a token for one expert: the token's `D` numbers on the wire type, and
behind them where it goes (and its scale, for INT8), so that one all-to-all carries everything.
Results return unquantised, as in the paper.

Methods differ in how mailboxes travel: `flat` in one all-to-all over all ranks, `hierarchical` tier by tier
(as UB switches are tiered, section 3.1.4), for which nodes are an axis of their own. `allgather` has no
mailboxes: all tokens go everywhere.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Bool, Float, Int, Shaped

from cmx_jax.errors import CmxError
from cmx_jax.quant import dequantize, quantize_rows

Axis = str | tuple[str, ...]
ExpertFn = Callable[[Float[Array, "N D"], Int[Array, " N"]], Float[Array, "N D"]]
"""Received rows and the local expert slot of each (-1: empty row) to the rows' results."""

Move = Callable[[Shaped[Array, "GN M"], Axis], Shaped[Array, "GN M"]]
"""Mailboxes `[ranks * rows, message]` by destination to mailboxes by source."""

WIRES = ("float32", "bfloat16", "int8")
MAX_SLOTS_PER_RANK = 127 * 128 + 126  # what two INT8 digits tell apart, see _pack
_META = {"float32": 2, "bfloat16": 2, "int8": 6}  # elements behind the token, see _pack


@struct.dataclass
class ExchangeStats:
    """What one exchange did on this rank. Scalars; the runners stack them over ranks."""

    rounds: Any  # [] int32
    sent: Any  # [] int32: messages this rank sent, to its own experts included
    received: Any  # [] int32: messages that this rank's experts answered


@runtime_checkable
class Exchange(Protocol):
    """The signature behind which every exchange method stands."""

    def __call__(
        self,
        x: Float[Array, "T D"],
        slots: Int[Array, "T K"],
        weights: Float[Array, "T K"],
        experts: ExpertFn,
        *,
        axis: Axis,
        slots_per_rank: int,
        rows: int,
        wire: str,
    ) -> tuple[Float[Array, "T D"], ExchangeStats]: ...


def worst_case_rows(tokens: int, top_k: int, slots_per_rank: int) -> int:
    """Rows that one peer can ever need: `local_batch x min(top_k, experts_per_rank)` (section 4.2.1).

    That holds because the slots of a token are all different.
    """
    return tokens * min(top_k, slots_per_rank)


def usual_rows(tokens: int, top_k: int, slots_per_rank: int, ranks: int) -> int:
    """Twice the mean load of a peer plus two, at most the worst case."""
    mean = -(-tokens * top_k // ranks)
    return min(worst_case_rows(tokens, top_k, slots_per_rank), 2 * mean + 2)


def message_bytes(width: int, wire: str) -> int:
    """Bytes of one dispatched message on the wire: the token and what is packed behind it."""
    return (width + _META[wire]) * jnp.dtype(wire).itemsize


def _pack(
    x: Shaped[Array, "N D"], slot: Int[Array, " N"], valid: Bool[Array, " N"], wire: str
) -> Shaped[Array, "N M"]:
    """Token and metadata as one row. The slot travels as two digits that every wire type holds exactly."""
    stamp = jnp.where(valid, slot + 1, 0)  # 0 marks an empty row
    digits = jnp.stack([stamp // 128, stamp % 128], axis=-1)
    if wire == "int8":
        q, scale = quantize_rows(x, valid)
        return jnp.concatenate(
            [q, jax.lax.bitcast_convert_type(scale, jnp.int8), digits.astype(jnp.int8)], axis=-1
        )
    token = jnp.where(valid[:, None], x, jnp.zeros((), x.dtype)).astype(wire)
    return jnp.concatenate([token, digits.astype(wire)], axis=-1)


def _unpack(
    row: Shaped[Array, "N M"], width: int, wire: str, dtype: jnp.dtype
) -> tuple[Float[Array, "N D"], Int[Array, " N"]]:
    """Tokens in `dtype`, and their local slots (-1: empty row)."""
    digits = row[:, -2:].astype(jnp.int32)
    slot = digits[:, 0] * 128 + digits[:, 1] - 1
    if wire == "int8":
        scale = jax.lax.bitcast_convert_type(row[:, width : width + 4], jnp.float32)
        return dequantize(row[:, :width], scale, dtype), slot
    return row[:, :width].astype(dtype), slot


class _Outbox(NamedTuple):
    """Where each message goes: destination rank (G: nowhere) and its turn in that rank's queue."""

    rank: Int[Array, " M"]
    turn: Int[Array, " M"]
    longest: Int[Array, ""]


def turns(keys: Int[Array, " M"], bins: int) -> tuple[Int[Array, " M"], Int[Array, " B"]]:
    """How many equal keys stand before each, and how often each key in `[0, bins)` is there."""
    order = jnp.argsort(keys, stable=True)
    counts = jnp.bincount(keys, length=bins)
    start = jnp.cumsum(counts) - counts
    place = jnp.zeros_like(keys).at[order].set(jnp.arange(keys.shape[0], dtype=keys.dtype))
    return place - start[keys], counts


def _queue(slots: Int[Array, " M"], slots_per_rank: int, ranks: int) -> _Outbox:
    """Queues messages by destination, in the order of their tokens."""
    rank = jnp.where(slots < 0, ranks, slots // slots_per_rank)
    turn, counts = turns(rank, ranks + 1)
    return _Outbox(rank, turn, jnp.max(counts[:ranks]))


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
    move: Move,
) -> tuple[Float[Array, "T D"], ExchangeStats]:
    """Mailboxes out, experts, mailboxes back, round by round.

    Args:
      x: this rank's tokens.
      slots: for each token its global expert slots, all different; -1 sends nothing.
      weights: what each expert's answer counts for.
      experts: the local experts.
      axis: mesh axis (or axes) of the expert-parallel ranks.
      slots_per_rank: rank `r` owns slots `[r * slots_per_rank, (r + 1) * slots_per_rank)`.
      rows: mailbox rows for each peer.
      wire: type on the way out; the way back is `x.dtype`, or bfloat16 for `int8` and `bfloat16`.
      move: takes the mailboxes to their ranks.

    Returns:
      `sum_k weights[t, k] * expert_{slots[t, k]}(x[t])`, summed in float32 in the order of `k`, so
      that neither rounds nor ranks change the result; and the stats.
    """
    ranks = jax.lax.axis_size(axis)
    (tokens, top_k), width = slots.shape, x.shape[-1]
    messages, flat_slots = tokens * top_k, slots.reshape(-1)
    outbox = _queue(flat_slots, slots_per_rank, ranks)
    back = x.dtype if wire == "float32" else jnp.dtype(jnp.bfloat16)

    def one_round(turn: Int[Array, ""] | int, carry: tuple[Array, Array]) -> tuple[Array, Array]:
        results, count = carry
        row = outbox.turn - turn * rows
        here = (row >= 0) & (row < rows) & (outbox.rank < ranks)
        place = jnp.where(here, outbox.rank * rows + row, ranks * rows)
        box = jnp.full((ranks * rows,), messages).at[place].set(jnp.arange(messages), mode="drop")
        valid = box < messages
        source = jnp.where(valid, box, 0)
        with jax.named_scope("Dispatch"):
            mail = _pack(x[source // top_k], flat_slots[source] % slots_per_rank, valid, wire)
            mail = move(mail, axis)
        rows_, local = _unpack(mail, width, wire, x.dtype)
        answers = experts(rows_, local).astype(back)
        with jax.named_scope("Combine"):
            answers = move(answers, axis)
        results = results.at[box].set(answers.astype(x.dtype), mode="drop")
        return results, count + jnp.sum(local >= 0).astype(jnp.int32)

    start = jnp.zeros((messages, width), x.dtype), jnp.zeros((), jnp.int32)
    if rows >= worst_case_rows(tokens, top_k, slots_per_rank):
        rounds = jnp.ones((), jnp.int32)
        results, received = one_round(0, start)
    else:  # every rank must take part in every round, so all agree on their number first
        rounds = jax.lax.pmax(-(-outbox.longest // rows), axis).astype(jnp.int32)
        results, received = jax.lax.fori_loop(0, rounds, one_round, start)
    used = jnp.where(slots < 0, 0.0, weights)
    answers = results.reshape(tokens, top_k, width).astype(jnp.float32)
    y = jnp.einsum("tk,tkd->td", used, answers, precision="highest").astype(x.dtype)
    return y, ExchangeStats(rounds, jnp.sum(flat_slots >= 0).astype(jnp.int32), received)


def _at_once(mail: Shaped[Array, "GN M"], axis: Axis) -> Shaped[Array, "GN M"]:
    """One all-to-all over all ranks."""
    boxes = mail.reshape(jax.lax.axis_size(axis), -1, mail.shape[-1])
    return jax.lax.all_to_all(boxes, axis, 0, 0).reshape(mail.shape)


def _tier_by_tier(mail: Shaped[Array, "GN M"], axis: Axis) -> Shaped[Array, "GN M"]:
    """One all-to-all for each axis, innermost first: to the right NPU number within the node, then to the
    right node. Every byte moves once a tier, but a rank of 20 nodes talks to 7 + 19 others instead of 159."""
    names = (axis,) if isinstance(axis, str) else axis
    boxes = mail.reshape(*(jax.lax.axis_size(name) for name in names), -1, mail.shape[-1])
    for dim, name in reversed(list(enumerate(names))):
        boxes = jax.lax.all_to_all(boxes, name, dim, dim)
    return boxes.reshape(mail.shape)


def gathered(
    x: Float[Array, "T D"],
    slots: Int[Array, "T K"],
    weights: Float[Array, "T K"],
    experts: ExpertFn,
    *,
    axis: Axis,
    slots_per_rank: int,
    rows: int,
    wire: str,
) -> tuple[Float[Array, "T D"], ExchangeStats]:
    """All-gather of the tokens, every rank's experts on those that chose them, reduce-scatter of the sums.

    The way of those who have no token exchange: `G` times the tokens reach each rank, whether they are for it
    or not. Arguments and result as of `drained`, but the sum is over ranks, so its rounding depends on the
    layout.
    """
    del rows  # nothing is queued
    names = (axis,) if isinstance(axis, str) else axis
    (tokens, top_k), width = slots.shape, x.shape[-1]
    sent = slots >= 0
    first = jax.lax.axis_index(axis) * slots_per_rank
    with jax.named_scope("Dispatch"):
        mail = _pack(x, jnp.zeros(tokens, jnp.int32), jnp.any(sent, axis=1), wire)
        mail, slots, weights = (gather(a, axis) for a in (mail, slots, jnp.where(sent, weights, 0.0)))
        received, _ = _unpack(mail, width, wire, x.dtype)
    mine = (slots >= first) & (slots < first + slots_per_rank)
    most = min(top_k, slots_per_rank)  # the slots of a token are all different
    order = jnp.argsort(~mine, axis=1, stable=True)[:, :most]
    local = jnp.take_along_axis(jnp.where(mine, slots - first, -1), order, axis=1)
    used = jnp.take_along_axis(jnp.where(mine, weights, 0.0), order, axis=1)
    answers = experts(jnp.repeat(received, most, axis=0), local.reshape(-1))
    answers = jnp.where(local.reshape(-1, 1) < 0, 0.0, answers.astype(jnp.float32)).reshape(
        *local.shape, width
    )
    with jax.named_scope("Combine"):
        y = jnp.einsum("tk,tkd->td", used, answers, precision="highest")
        for name in names:
            y = jax.lax.psum_scatter(y, name, scatter_dimension=0, tiled=True)
    counts = (jnp.sum(a).astype(jnp.int32) for a in (sent, local >= 0))
    return y.astype(x.dtype), ExchangeStats(jnp.ones((), jnp.int32), *counts)


def gather(x: Array, axis: Axis, dim: int = 0) -> Array:
    """Of all ranks along `dim`, axis by axis: one gather over several mesh axes does not run as lanes."""
    for name in reversed((axis,) if isinstance(axis, str) else axis):
        x = jax.lax.all_gather(x, name, axis=dim, tiled=True)
    return x


EXCHANGES: dict[str, Exchange] = {
    "flat": partial(drained, move=_at_once),
    "hierarchical": partial(drained, move=_tier_by_tier),
    "allgather": gathered,
}


def exchange(method: str) -> Exchange:
    """The exchange of that name.

    Raises:
      CmxError: there is none.
    """
    if method not in EXCHANGES:
        raise CmxError(f"exchange {method!r} is unknown, expected one of {sorted(EXCHANGES)}")
    return EXCHANGES[method]
