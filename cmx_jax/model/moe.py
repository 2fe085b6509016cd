"""A token's path through a MoE layer: gate, dispatch, experts, combine, shared expert."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Bool, Float, Int

from cmx_jax.mesh.exchange import Exchange, ExchangeArgs, ExchangeStats, Wire, allgather_exchange, exchange
from cmx_jax.mesh.exchange.ordering import bincount
from cmx_jax.mesh.layout import Layout
from cmx_jax.mesh.placement import choose_slots
from cmx_jax.model.config import ModelConfig
from cmx_jax.model.gate import route
from cmx_jax.model.layers import grouped_swiglu, swiglu
from cmx_jax.model.weights import Experts, MoE

RunExperts = Callable[
    [Float[Array, "T D"], Int[Array, "T K"], Float[Array, "T K"], MoE, Experts, Int[Array, ""]],
    tuple[Float[Array, "T D"], ExchangeStats],
]
"""(tokens, their experts (-1: none), weights of these, weights of the layer, this rank's experts, layer
number) -> (weighted sums of the experts' results, stats)."""


@struct.dataclass
class MoEStats:
    """Statistics of one MoE layer on one rank.

    Attributes:
      exchange: `ExchangeStats` of the token exchange.
      load: Number of tokens that chose each expert, int32 `[E]`.
    """

    exchange: Any
    load: Any


def expert_parallel(layout: Layout, rows: int) -> RunExperts:
    """Runs experts on their own ranks: choose a replica, dispatch, grouped SwiGLU, combine.

    Args:
      layout: The layout: expert slots and exchange.
      rows: Rows of a mailbox.
    """
    # ranks along the `shared` axes have the same tokens
    shared = tuple(name for name in layout.experts if name in layout.tensor)
    split = tuple(name for name in layout.experts if name not in shared)
    send: Exchange = partial(allgather_exchange, shared=shared) if shared else exchange(layout.exchange)
    args = ExchangeArgs(layout.experts, layout.slots_per_rank, rows, layout.wire)

    def run(
        x: Array, chosen: Array, weights: Array, w: MoE, experts: Experts, layer: Array
    ) -> tuple[Array, ExchangeStats]:
        def ffn(received: Array, local: Array, wire: Wire) -> Array:
            with jax.named_scope("MLP"):
                # mailboxes are mostly empty: a rank gets about as many rows as it sends
                return grouped_swiglu(received, local, experts, layer, slots.size, wire)

        slots = choose_slots(chosen, w.slots, w.first_slot, split, layout.replicated)
        return send(x, slots, weights, ffn, args)

    return run


def moe(
    x: Float[Array, "T D"],
    active: Bool[Array, " T"],
    w: MoE,
    experts: Experts,
    layer: Int[Array, ""],
    c: ModelConfig,
    run: RunExperts,
) -> tuple[Float[Array, "T D"], MoEStats]:
    """Routed experts plus the shared expert; inactive tokens (padding) are sent nowhere.

    `w` holds the weights of one layer, `experts` those of the whole stack, in which `layer` is its index.
    """
    with jax.named_scope("Gate"):
        routing = route(x, w.router, w.router_bias, c)
        chosen = jnp.where(active[:, None], routing.experts, -1)
        counted = jnp.where(chosen < 0, c.n_routed_experts, chosen)
        load = bincount(counted.reshape(-1), c.n_routed_experts + 1)[:-1]
        chosen, weights = _with_shared(chosen, routing.weights, w, c)
    y, stats = _run(x, chosen, weights, w, experts, layer, c, run)
    if w.shared is not None:
        with jax.named_scope("SharedExpert"):
            y = y + swiglu(x, w.shared)
    return y, MoEStats(stats, load)


def _with_shared(chosen: Array, weights: Array, w: MoE, c: ModelConfig) -> tuple[Array, Array]:
    """Adds shared experts that have slots to the choice of every token, with weight 1."""
    shared = w.first_slot.shape[0] - 1 - c.n_routed_experts
    if not shared:
        return chosen, weights
    numbers = c.n_routed_experts + jnp.arange(shared, dtype=chosen.dtype)[None]
    numbers = jnp.where(chosen[:, :1] < 0, -1, numbers)
    ones = jnp.ones(numbers.shape, weights.dtype)
    return jnp.concatenate([chosen, numbers], axis=1), jnp.concatenate([weights, ones], axis=1)


def _run(
    x: Array,
    chosen: Array,
    weights: Array,
    w: MoE,
    experts: Experts,
    layer: Array,
    c: ModelConfig,
    run: RunExperts,
) -> tuple[Array, ExchangeStats]:
    """Weighted sum of the experts' results, or under `weigh_input` the sum of results for weighted inputs.

    In that case (Llama 4) each copy of a token is sent as a token of its own, with one expert.
    """
    if not c.weigh_input:
        return run(x, chosen, weights, w, experts, layer)
    scaled = (x[:, None] * weights[:, :, None].astype(x.dtype)).reshape(-1, x.shape[1])
    ones = jnp.ones((chosen.size, 1), weights.dtype)
    y, stats = run(scaled, chosen.reshape(-1, 1), ones, w, experts, layer)
    return jnp.sum(y.reshape(*chosen.shape, -1), axis=1), stats
