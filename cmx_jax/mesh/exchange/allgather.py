"""The exchange without messages: every token goes to every rank.

Systems without a token exchange work like this: all-gather of the tokens, every rank's experts on the tokens
that chose them, reduce-scatter of the sums. Each rank receives `G` times its tokens, most of which are for
other ranks. Where tensor parallelism already has all tokens on all ranks, nothing moves.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from cmx_jax.mesh.exchange.axis_collectives import axis_names, gather
from cmx_jax.mesh.exchange.message import Wire, pack_messages
from cmx_jax.mesh.exchange.protocol import ExchangeArgs, ExchangeStats, ExpertFn


def allgather_exchange(
    x: Float[Array, "T D"],
    slots: Int[Array, "T K"],
    weights: Float[Array, "T K"],
    experts: ExpertFn,
    args: ExchangeArgs,
    *,
    shared: tuple[str, ...] = (),
) -> tuple[Float[Array, "T D"], ExchangeStats]:
    """Gathers all tokens, runs the experts, reduce-scatters the weighted sums. See `Exchange`.

    The sum runs over ranks, so its rounding depends on the layout. There are no queues: `args.rows` is not
    used.

    Args:
      x: Tokens of this rank.
      slots: Global expert slots of each token, all different; -1 sends nothing.
      weights: Weight of each expert's result in the sum.
      experts: Runs the local experts.
      args: Settings.
      shared: Axes along which ranks have the same tokens (tensor parallelism). Nothing moves there, and the
        result is this rank's part of a sum over them.
    """
    axis, slots_per_rank, wire = args.axis, args.slots_per_rank, args.wire
    names = tuple(name for name in axis_names(axis) if name not in shared)
    (tokens, top_k), width = slots.shape, x.shape[-1]
    sent, wire = slots >= 0, wire if names else x.dtype.name
    first = jax.lax.axis_index(axis) * slots_per_rank
    with jax.named_scope("Dispatch"):
        mail = pack_messages(x, jnp.zeros(tokens, jnp.int32), jnp.any(sent, axis=1), wire)
        mail, slots, weights = (gather(a, names) for a in (mail, slots, jnp.where(sent, weights, 0.0)))
    mine = (slots >= first) & (slots < first + slots_per_rank)
    copies = min(top_k, slots_per_rank)  # the slots of a token are all different
    order = jnp.argsort(~mine, axis=1, stable=True)[:, :copies]
    local = jnp.take_along_axis(jnp.where(mine, slots - first, -1), order, axis=1)
    used = jnp.take_along_axis(jnp.where(mine, weights, 0.0), order, axis=1)
    answers = experts(jnp.repeat(mail, copies, axis=0), local.reshape(-1), Wire(width, wire, x.dtype))
    answers = jnp.where(local.reshape(-1, 1) < 0, 0.0, answers.astype(jnp.float32)).reshape(
        *local.shape, width
    )
    with jax.named_scope("Combine"):
        y = jnp.einsum("tk,tkd->td", used, answers, precision="highest")
        for name in names:
            y = jax.lax.psum_scatter(y, name, scatter_dimension=0, tiled=True)
    counts = (jnp.sum(a).astype(jnp.int32) for a in (sent & bool(names), local >= 0))
    return y.astype(x.dtype), ExchangeStats(jnp.ones((), jnp.int32), *counts)
