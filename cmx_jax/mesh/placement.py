"""Which expert lies in which slot, and to which of its replicas a token goes (section 2).

The paper's decode instance has 320 slots: 256 routed experts, 32 redundant replicas of the busiest, 32
copies of the shared expert. A placement is `expert_of_slot`, int32 [L, X] with -1 for an empty slot; shared
experts that have slots are numbered behind the `E` routed ones. Without slots of its own the shared expert
is on every rank, as in the prefill instance (per die 1 shared + 8 routed + 1 redundant).
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from cmx_jax.errors import CmxError
from cmx_jax.mesh.eplb import pack, rebalance_experts, replicate
from cmx_jax.mesh.exchange import Axis
from cmx_jax.mesh.exchange.ordering import rank_in_group
from cmx_jax.mesh.layout import Layout
from cmx_jax.mesh.supernode import CLOUDMATRIX384


class SlotTable(NamedTuple):
    """A placement as the router reads it: `slots [L, X]` in order of their expert (empty ones last), of which
    expert `e` has those from `first[e]` to `first[e + 1]`, `first [L, E + 1]`. int32."""

    slots: np.ndarray
    first: np.ndarray


def check_slots(layout: Layout, experts: int, shared_experts: int) -> None:
    """Refuses a layout whose slots experts do not fill.

    Args:
      layout: its slots.
      experts: routed ones.
      shared_experts: that its shared slots hold.

    Raises:
      CmxError: they do not.
    """
    filled, shared = experts + layout.redundant_slots + layout.shared_slots, layout.shared_slots
    if filled != layout.slots:
        raise CmxError(
            f"layout: {experts} experts, {layout.redundant_slots} redundant and {shared} shared slots are "
            f"{filled}, expected to fill the {layout.slots} slots"
        )
    if shared and (not shared_experts or shared % shared_experts):
        raise CmxError(
            f"layout: {shared} shared slots, expected a multiple of {shared_experts} shared experts"
        )


def place(
    load: np.ndarray, layout: Layout, *, top_k: int, groups: int = 1, shared_experts: int = 0
) -> np.ndarray:
    """Experts in slots so that ranks are loaded alike: DeepSeek's EPLB.

    Args:
      load: how often each routed expert was chosen, [L, E]; all equal where nothing is known.
      layout: its slots.
      top_k: experts that a token chooses.
      groups: of the router: where nodes divide them, an expert stays on the node of its group.
      shared_experts: that the layout's shared slots hold; every token goes to each.

    Raises:
      CmxError: slots that the experts do not fit.
    """
    layers, experts = load.shape
    check_slots(layout, experts, shared_experts)
    routed, shared = layout.slots - layout.shared_slots, layout.shared_slots
    if not shared:
        nodes, rest = divmod(layout.expert_ranks, CLOUDMATRIX384.npus_per_node)
        nodes = 1 if rest else nodes  # without whole nodes experts may lie anywhere
        return rebalance_experts(load, routed, groups, nodes, layout.expert_ranks).phy2log.astype(np.int32)
    load = load.astype(np.float32)
    expert, _, count = replicate(load, routed)
    share = np.take_along_axis(load / count.astype(np.float32), expert, axis=1)
    every = load.sum(axis=1, keepdims=True) / top_k / (shared // shared_experts)
    share = np.concatenate([share, np.broadcast_to(every, (layers, shared))], axis=1)
    copies = np.broadcast_to(experts + np.arange(shared) % shared_experts, (layers, shared))
    rank, turn = pack(share, layout.expert_ranks)
    table = np.empty((layers, layout.slots), np.int32)
    np.put_along_axis(
        table, rank * layout.slots_per_rank + turn, np.concatenate([expert, copies], axis=1), axis=1
    )
    return table


def even(layers: int, experts: int, layout: Layout) -> np.ndarray:
    """One slot for each expert, spread evenly, in order.

    Raises:
      CmxError: there are more experts than slots.
    """
    table = np.full((layers, layout.slots), -1, np.int32)
    table[:, layout.placement(experts)] = np.arange(experts)
    return table


def slot_table(expert_of_slot: np.ndarray, experts: int) -> SlotTable:
    """For each expert its slots. `experts`: all that are placed, shared ones included."""
    order = np.argsort(np.where(expert_of_slot < 0, experts, expert_of_slot), axis=1, kind="stable")
    first = np.zeros((len(expert_of_slot), experts + 1), np.int32)
    first[:, 1:] = np.cumsum(replicas(expert_of_slot, experts), axis=1)
    return SlotTable(order.astype(np.int32), first)


def replicas(expert_of_slot: np.ndarray, experts: int) -> np.ndarray:
    """Slots of each expert, [L, E]."""
    return np.stack([np.bincount(row[row >= 0], minlength=experts) for row in expert_of_slot])


def moved(before: np.ndarray, after: np.ndarray, ranks: int) -> int:
    """Slots, over all layers, whose expert was on another rank before."""
    old, new = (a.reshape(len(a), ranks, -1) for a in (before, after))
    here = (new[..., :, None] == old[..., None, :]).any(-1)
    return int((~here & (new >= 0)).sum())


def choose(
    experts: Int[Array, "T K"],
    slots: Int[Array, " X"],
    first: Int[Array, " E"],
    axis: Axis,
    replicated: bool,
) -> Int[Array, "T K"]:
    """The slot for each chosen expert (-1: none). A rank deals its tokens for an expert out to the replicas
    in turn, beginning with another one than other ranks: on each rank replicas differ by one token at most.

    Args:
      slots, first: one layer of a `SlotTable`.
      axis: the ranks.
      replicated: whether any expert may have several slots.
    """
    flat = experts.reshape(-1)
    if not replicated:
        return jnp.where(flat < 0, -1, slots[flat]).reshape(experts.shape)
    count = first[flat + 1] - first[flat]
    begin = jax.lax.axis_index(axis) * count // jax.lax.axis_size(axis)
    turn, _ = rank_in_group(jnp.where(flat < 0, first.shape[0] - 1, flat), first.shape[0])
    slot = slots[first[flat] + (begin + turn) % jnp.maximum(count, 1)]
    return jnp.where(flat < 0, -1, slot).reshape(experts.shape)
