"""Placement of experts in slots, and the choice of a replica for each token (section 2).

The paper's decode instance has 320 slots: 256 routed experts, 32 redundant replicas of the busiest, 32
copies of the shared expert. A placement is `expert_of_slot`, int32 [L, X] with -1 for an empty slot. Shared
experts in slots are numbered after the `E` routed experts. A shared expert without slots is on every rank, as
in the prefill instance (per die 1 shared + 8 routed + 1 redundant).

Letters in shapes: `L` layers, `E` experts, `X` slots.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from cmx_jax.errors import CmxError
from cmx_jax.mesh.eplb import balanced_packing, rebalance_experts, replicate_experts
from cmx_jax.mesh.exchange import Axis
from cmx_jax.mesh.exchange.ordering import rank_in_group
from cmx_jax.mesh.layout import Layout
from cmx_jax.mesh.supernode import CLOUDMATRIX384


class SlotTable(NamedTuple):
    """A placement as the router reads it.

    Attributes:
      slots: Slots in the order of their experts, empty slots last, int32 [L, X].
      first: Index in `slots` of each expert's first slot, int32 [L, E + 1]: expert `e` has the slots from
        `first[e]` to before `first[e + 1]`.
    """

    slots: np.ndarray
    first: np.ndarray


def check_slots(layout: Layout, experts: int, shared_experts: int) -> None:
    """Refuses a layout whose slots experts do not fill.

    Args:
      layout: Layout with the slots.
      experts: Number of routed experts.
      shared_experts: Number of shared experts, which the shared slots hold.

    Raises:
      CmxError: The experts do not fill the slots.
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
    """Places experts in slots so that ranks have equal loads, by DeepSeek's EPLB.

    Args:
      load: Number of times that each routed expert was chosen, [L, E]; all equal if not known.
      layout: Layout with the slots.
      top_k: Number of experts that a token chooses.
      groups: Expert groups of the router. If the number of nodes divides it, an expert stays on the node of
        its group.
      shared_experts: Number of shared experts, which the layout's shared slots hold. Every token goes to each
        of them.

    Returns:
      Expert of each slot, int32 [L, X].

    Raises:
      CmxError: The experts do not fill the slots.
    """
    layers, experts = load.shape
    check_slots(layout, experts, shared_experts)
    routed, shared = layout.slots - layout.shared_slots, layout.shared_slots
    if not shared:
        nodes, rest = divmod(layout.expert_ranks, CLOUDMATRIX384.npus_per_node)
        nodes = 1 if rest else nodes  # without whole nodes experts may lie anywhere
        return rebalance_experts(load, routed, groups, nodes, layout.expert_ranks).phy2log.astype(np.int32)
    load = load.astype(np.float32)
    expert, _, count = replicate_experts(load, routed)
    share = np.take_along_axis(load / count.astype(np.float32), expert, axis=1)
    every = load.sum(axis=1, keepdims=True) / top_k / (shared // shared_experts)
    share = np.concatenate([share, np.broadcast_to(every, (layers, shared))], axis=1)
    copies = np.broadcast_to(experts + np.arange(shared) % shared_experts, (layers, shared))
    rank, position = balanced_packing(share, layout.expert_ranks)
    table = np.empty((layers, layout.slots), np.int32)
    np.put_along_axis(
        table, rank * layout.slots_per_rank + position, np.concatenate([expert, copies], axis=1), axis=1
    )
    return table


def spread_evenly(layers: int, experts: int, layout: Layout) -> np.ndarray:
    """Places each expert in one slot, in order, spread evenly.

    Raises:
      CmxError: There are more experts than slots.
    """
    table = np.full((layers, layout.slots), -1, np.int32)
    table[:, layout.placement(experts)] = np.arange(experts)
    return table


def slot_table(expert_of_slot: np.ndarray, experts: int) -> SlotTable:
    """Makes the table of each expert's slots.

    Args:
      expert_of_slot: Placement, [L, X].
      experts: Number of placed experts, shared ones included.
    """
    order = np.argsort(np.where(expert_of_slot < 0, experts, expert_of_slot), axis=1, kind="stable")
    first = np.zeros((len(expert_of_slot), experts + 1), np.int32)
    first[:, 1:] = np.cumsum(replicas(expert_of_slot, experts), axis=1)
    return SlotTable(order.astype(np.int32), first)


def replicas(expert_of_slot: np.ndarray, experts: int) -> np.ndarray:
    """Number of slots of each expert, [L, E]."""
    return np.stack([np.bincount(row[row >= 0], minlength=experts) for row in expert_of_slot])


def count_moved(before: np.ndarray, after: np.ndarray, ranks: int) -> int:
    """Counts the slots of all layers whose expert was not on the same rank before."""
    old, new = (a.reshape(len(a), ranks, -1) for a in (before, after))
    present = (new[..., :, None] == old[..., None, :]).any(-1)
    return int((~present & (new >= 0)).sum())


def choose_slots(
    experts: Int[Array, "T K"],
    slots: Int[Array, " X"],
    first: Int[Array, " E"],
    axis: Axis,
    replicated: bool,
) -> Int[Array, "T K"]:
    """Chooses a slot for each chosen expert.

    A rank deals its tokens for an expert to the expert's replicas in turn, and ranks begin with different
    replicas. On each rank the replicas' numbers of tokens differ by one at most.

    Args:
      experts: Chosen experts of each token; -1 for none.
      slots: `SlotTable.slots` of one layer.
      first: `SlotTable.first` of one layer.
      axis: Mesh axes of the ranks.
      replicated: False if no expert has several slots.

    Returns:
      Slots of each token; -1 for none.
    """
    flat = experts.reshape(-1)
    if not replicated:
        return jnp.where(flat < 0, -1, slots[flat]).reshape(experts.shape)
    count = first[flat + 1] - first[flat]
    begin = jax.lax.axis_index(axis) * count // jax.lax.axis_size(axis)
    number, _ = rank_in_group(jnp.where(flat < 0, first.shape[0] - 1, flat), first.shape[0])
    slot = slots[first[flat] + (begin + number) % jnp.maximum(count, 1)]
    return jnp.where(flat < 0, -1, slot).reshape(experts.shape)
