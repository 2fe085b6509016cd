"""Experts in a program of whole arrays, which the compiler splits: GShard's masks (arXiv 2006.16668).

No rank, no axis, no collective is named. Tokens are grouped, one group for each rank that has tokens; each
group has `rows` places in every slot. Masks `[G, T, X, rows]` put tokens into places and back as matrix
products, and the compiler chooses what to move. The masks grow with the square of a group's tokens: this is a
baseline, for short prompts.

The compiler's choice depends on sizes. For DeepSeek-R1 over 256 devices, with places for twice the mean load,
XLA:CPU sends the places to their experts. With places for the worst case, which are larger than a layer's
experts, it gathers the experts instead.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array

from cmx_jax.mesh.exchange import ExchangeStats
from cmx_jax.mesh.layout import Layout
from cmx_jax.mesh.placement import choose_slots
from cmx_jax.model.moe import RunExperts
from cmx_jax.model.weights import Experts, MoE
from cmx_jax.quant import einsum


def gspmd_masked(layout: Layout, rows: int) -> RunExperts:
    """Runs all experts on all their places, filled or not; tokens beyond a group's last place are dropped.

    Args:
      layout: The layout: expert slots and groups.
      rows: Places of a group in a slot; with as many as a group has tokens nothing is dropped.
    """

    def run(
        x: Array, chosen: Array, weights: Array, w: MoE, experts: Experts, layer: Array
    ) -> tuple[Array, ExchangeStats]:
        with jax.named_scope("Dispatch"):
            slots = choose_slots(chosen, w.slots, w.first_slot, (), layout.replicated)
            grouped, slots, weights = (a.reshape(layout.groups, -1, a.shape[1]) for a in (x, slots, weights))
            to_slot = jax.nn.one_hot(slots, layout.slots, dtype=jnp.int32)  # [G, T, K, X]; zeros for slot -1
            flat = to_slot.reshape(layout.groups, -1, layout.slots)
            before = (jnp.cumsum(flat, axis=1) - flat).reshape(to_slot.shape)
            turn = jnp.sum(before * to_slot, axis=-1)
            to_row = jax.nn.one_hot(turn, rows, dtype=x.dtype)  # zeros for a turn beyond the last place
            to_slot = to_slot.astype(x.dtype)
            mask = jnp.einsum("gtkx,gtkr->gtxr", to_slot, to_row)
            used = jnp.einsum("gtkx,gtkr->gtxr", to_slot * weights[..., None].astype(x.dtype), to_row)
            sent = jnp.einsum("gtxr,gtd->xgrd", mask, grouped, precision="highest")
        with jax.named_scope("MLP"):
            gate_up, down = jax.tree.map(lambda a: a[:, layer], (experts.gate_up, experts.down))
            h = einsum("xgrd,xdhf->xgrhf", sent, gate_up)
            answers = einsum("xgrf,xfd->xgrd", jax.nn.silu(h[..., 0, :]) * h[..., 1, :], down)
        with jax.named_scope("Combine"):
            wide = jnp.dtype(jnp.float32)
            y = jnp.einsum("gtxr,xgrd->gtd", used, answers, precision="highest", preferred_element_type=wide)
        counts = (jnp.sum(a).astype(jnp.int32) for a in (slots >= 0, (slots >= 0) & (turn < rows)))
        return y.reshape(x.shape).astype(x.dtype), ExchangeStats(jnp.ones((), jnp.int32), *counts)

    return run
