"""The token exchange: dispatch tokens to the ranks of their experts, combine what comes back.

The paper's FusedDispatch and FusedCombine (section 4.2.1) write each message straight into a
preallocated slot of the peer's memory. An XLA all-to-all moves the whole mailbox instead, so here
the mailbox `[G, rows, message]` is sized for the usual load and drained in rounds (`mailbox.py`).
Results return unquantised, as in the paper.

Methods differ in how messages travel: `flat` in one all-to-all over all ranks, `hierarchical` tier by tier
(as UB switches are tiered, section 3.1.4), for which nodes are an axis of their own. `ragged` moves only real
messages, on accelerators (`ragged.py`). `allgather` has no messages: all tokens go everywhere, and where
tensor parallelism has them everywhere already, nothing goes.
"""

from collections.abc import Callable
from functools import partial
from typing import Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Shaped

from cmx_jax.errors import CmxError
from cmx_jax.mesh.exchange.mailbox import (
    Axis,
    ExchangeStats,
    ExpertFn,
    Route,
    drained,
    usual_rows,
    worst_case_rows,
)
from cmx_jax.mesh.exchange.message import MAX_SLOTS_PER_RANK, WIRES, Wire, message_bytes, pack
from cmx_jax.mesh.exchange.ragged import packed

__all__ = [
    "EXCHANGES",
    "MAX_SLOTS_PER_RANK",
    "WIRES",
    "Axis",
    "Exchange",
    "ExchangeStats",
    "exchange",
    "gather",
    "gathered",
    "message_bytes",
    "summed",
    "usual_rows",
    "worst_case_rows",
]

Move = Callable[[Shaped[Array, "GN M"], Axis], Shaped[Array, "GN M"]]
"""Mailboxes `[ranks * rows, message]` by destination to mailboxes by source."""


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


def _mailboxes(move: Move, counts: Int[Array, " G"], rows: int, messages: int, axis: Axis) -> Route:
    """A round in which every peer has a mailbox of `rows` rows, and whole mailboxes move, filled or not."""
    del messages
    ranks = len(counts)

    def carry(mail: Shaped[Array, "GN M"]) -> Shaped[Array, "GN M"]:
        return move(mail, axis)

    return Route(jnp.arange(ranks, dtype=jnp.int32) * rows, ranks * rows, carry, carry)


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
    shared: tuple[str, ...] = (),
) -> tuple[Float[Array, "T D"], ExchangeStats]:
    """All-gather of the tokens, every rank's experts on those that chose them, reduce-scatter of the sums.

    The way of those who have no token exchange: `G` times the tokens reach each rank, whether they are for it
    or not. Arguments and result as of `drained`, but the sum is over ranks, so its rounding depends on the
    layout.

    Along the axes `shared` ranks have the same tokens (tensor parallelism): nothing moves there, and the
    result is this rank's part of a sum over them.
    """
    del rows  # nothing is queued
    names = tuple(name for name in ((axis,) if isinstance(axis, str) else axis) if name not in shared)
    (tokens, top_k), width = slots.shape, x.shape[-1]
    sent, wire = slots >= 0, wire if names else x.dtype.name
    first = jax.lax.axis_index(axis) * slots_per_rank
    with jax.named_scope("Dispatch"):
        mail = pack(x, jnp.zeros(tokens, jnp.int32), jnp.any(sent, axis=1), wire)
        mail, slots, weights = (gather(a, names) for a in (mail, slots, jnp.where(sent, weights, 0.0)))
    mine = (slots >= first) & (slots < first + slots_per_rank)
    most = min(top_k, slots_per_rank)  # the slots of a token are all different
    order = jnp.argsort(~mine, axis=1, stable=True)[:, :most]
    local = jnp.take_along_axis(jnp.where(mine, slots - first, -1), order, axis=1)
    used = jnp.take_along_axis(jnp.where(mine, weights, 0.0), order, axis=1)
    answers = experts(jnp.repeat(mail, most, axis=0), local.reshape(-1), Wire(width, wire, x.dtype))
    answers = jnp.where(local.reshape(-1, 1) < 0, 0.0, answers.astype(jnp.float32)).reshape(
        *local.shape, width
    )
    with jax.named_scope("Combine"):
        y = jnp.einsum("tk,tkd->td", used, answers, precision="highest")
        for name in names:
            y = jax.lax.psum_scatter(y, name, scatter_dimension=0, tiled=True)
    counts = (jnp.sum(a).astype(jnp.int32) for a in (sent & bool(names), local >= 0))
    return y.astype(x.dtype), ExchangeStats(jnp.ones((), jnp.int32), *counts)


def gather(x: Array, axis: Axis, dim: int = 0) -> Array:
    """Of all ranks along `dim`, axis by axis: one gather over several mesh axes does not run as lanes."""
    for name in reversed((axis,) if isinstance(axis, str) else axis):
        x = jax.lax.all_gather(x, name, axis=dim, tiled=True)
    return x


def summed(x: Array, axis: Axis) -> Array:
    """Over the ranks of some axes; `x` itself where there are none."""
    return jax.lax.psum(x, axis) if axis else x


EXCHANGES: dict[str, Exchange] = {
    "flat": partial(drained, travel=partial(_mailboxes, _at_once)),
    "hierarchical": partial(drained, travel=partial(_mailboxes, _tier_by_tier)),
    "ragged": partial(drained, travel=packed),
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
