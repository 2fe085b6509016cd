"""A token's path through a MoE layer: gate, dispatch, experts, combine, shared expert."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Bool, Float, Int

from cmx_jax.mesh.exchange import Axis, ExchangeStats, exchange
from cmx_jax.model.config import ModelConfig
from cmx_jax.model.layers import grouped_swiglu, swiglu
from cmx_jax.model.router import route
from cmx_jax.model.weights import Experts, MoE

RunExperts = Callable[
    [Float[Array, "T D"], Int[Array, "T K"], Float[Array, "T K"], Experts, Int[Array, ""]],
    tuple[Float[Array, "T D"], ExchangeStats],
]
"""Tokens, their global expert slots (-1: none) and weights, this rank's experts, layer -> weighted sums."""


@struct.dataclass
class MoEStats:
    """One MoE layer on one rank: the exchange's stats, and how many tokens chose each expert."""

    exchange: Any  # ExchangeStats
    load: Any  # [E] int32


def exchanged(method: str, *, axis: Axis, slots_per_rank: int, rows: int, wire: str) -> RunExperts:
    """Runs experts where they are: dispatch over `axis`, grouped SwiGLU there, combine."""
    send = exchange(method)

    def run(
        x: Array, slots: Array, weights: Array, experts: Experts, layer: Array
    ) -> tuple[Array, ExchangeStats]:
        def ffn(rows_: Array, local: Array) -> Array:
            with jax.named_scope("MLP"):
                return grouped_swiglu(rows_, local, experts, layer)

        return send(x, slots, weights, ffn, axis=axis, slots_per_rank=slots_per_rank, rows=rows, wire=wire)

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

    `w` is of one layer, `experts` of the whole stack, in which the layer is number `layer`.
    """
    with jax.named_scope("Gate"):
        routing = route(x, w.router, w.router_bias, c)
        slots = jnp.where(active[:, None], w.slot_of_expert[routing.experts], -1)
        chosen = jnp.where(active[:, None], routing.experts, c.n_routed_experts)
        load = jnp.bincount(chosen.reshape(-1), length=c.n_routed_experts + 1)[:-1].astype(jnp.int32)
    y, stats = _run(x, slots, routing.weights, experts, layer, c, run)
    if w.shared is not None:
        with jax.named_scope("SharedExpert"):
            y = y + swiglu(x, w.shared)
    return y, MoEStats(stats, load)


def _run(
    x: Array, slots: Array, weights: Array, experts: Experts, layer: Array, c: ModelConfig, run: RunExperts
) -> tuple[Array, ExchangeStats]:
    """Weighted sum of the experts' results; under `weigh_input` the sum for weighted inputs (Llama 4).

    Each copy of a token is then another token, of one expert.
    """
    if not c.weigh_input:
        return run(x, slots, weights, experts, layer)
    scaled = (x[:, None] * weights[:, :, None].astype(x.dtype)).reshape(-1, x.shape[1])
    y, stats = run(scaled, slots.reshape(-1, 1), jnp.ones((slots.size, 1), weights.dtype), experts, layer)
    return jnp.sum(y.reshape(*slots.shape, -1), axis=1), stats
