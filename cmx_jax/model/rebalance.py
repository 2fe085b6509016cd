"""Placements of a model's experts, by stack, and the relocation of experts from one placement to another."""

from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from jax.sharding import PartitionSpec as P

from cmx_jax.mesh.eplb import balancedness
from cmx_jax.mesh.layout import Layout
from cmx_jax.mesh.placement import SlotTable, count_moved, place, replicas, slot_table, spread_evenly
from cmx_jax.mesh.runners import Runner
from cmx_jax.model.config import ModelConfig
from cmx_jax.model.leaf import Leaf
from cmx_jax.model.sharding import laid_out, leaf_spec, shared_in_slots
from cmx_jax.model.weights import Weights, split_experts

Placement = dict[str, np.ndarray]
"""Expert of each slot, int32 `[L, X]`, by stack with MoE layers (`moe`, `mtp`)."""


def placed_experts(c: ModelConfig, layout: Layout) -> int:
    """Number of experts that have slots: the routed ones, and under `shared_slots` the shared ones."""
    return c.n_routed_experts + shared_in_slots(c, layout)


def initial(c: ModelConfig, layout: Layout, mtp: bool) -> Placement:
    """Placement of experts while no load is known.

    Args:
      c: The model.
      layout: Layout of the instance.
      mtp: True if the weights have MTP layers.

    Raises:
      CmxError: The experts do not fit the layout's slots.
    """
    layers = {"moe": c.num_moe_layers, "mtp": c.num_nextn_predict_layers if mtp else 0}
    if not layout.replicated:
        return {stack: spread_evenly(n, c.n_routed_experts, layout) for stack, n in layers.items() if n}
    return balanced({stack: np.ones((n, c.n_routed_experts)) for stack, n in layers.items() if n}, c, layout)


def balanced(load: dict[str, np.ndarray], c: ModelConfig, layout: Layout) -> Placement:
    """EPLB's placement for measured loads.

    Args:
      load: Tokens of each expert, `[L, E]`, by stack.
      c: The model.
      layout: Layout of the instance.

    Raises:
      CmxError: The experts do not fill the layout's slots.
    """
    shared = shared_in_slots(c, layout)
    return {
        stack: place(loads, layout, top_k=c.num_experts_per_tok, groups=c.n_group, shared_experts=shared)
        for stack, loads in load.items()
    }


def tables(c: ModelConfig, layout: Layout, placement: Placement) -> dict[str, SlotTable]:
    """Slot tables that the router reads, by stack."""
    count = placed_experts(c, layout)
    return {stack: slot_table(expert_of_slot, count) for stack, expert_of_slot in placement.items()}


def table_of(leaf: Leaf, slots: dict[str, SlotTable]) -> np.ndarray:
    """Values of a leaf of kind `slots`, given the slot tables by stack."""
    table = slots[leaf.stack]
    return table.slots if leaf.path.endswith(".slots") else table.first


def balance(load: dict[str, np.ndarray], placement: Placement, c: ModelConfig, layout: Layout) -> float:
    """Balancedness of a placement under a load, mean over layers.

    The balancedness of a layer is the load of the mean rank divided by that of the most loaded one.
    """
    count, values = placed_experts(c, layout), []
    for stack, expert_of_slot in placement.items():
        routed = load[stack].astype(np.float64)
        # every token chooses the shared experts
        tokens = routed.sum(axis=1, keepdims=True) / max(c.num_experts_per_tok, 1)
        loads = np.concatenate([routed, np.repeat(tokens, count - routed.shape[1], axis=1)], axis=1)
        values.append(
            balancedness(loads, expert_of_slot, replicas(expert_of_slot, count), layout.expert_ranks)
        )
    return float(np.concatenate(values).mean()) if values else 1.0


@dataclass(frozen=True)
class Move:
    """Effect of a rebalancing.

    Attributes:
      moved: Number of slots, over all layers, that received an expert from another rank.
      slots: Number of all slots, over all layers.
      before: Balancedness of the old placement, under the load for which the new one was made.
      after: Balancedness of the new placement under the same load.
    """

    moved: int
    slots: int
    before: float
    after: float


def describe(
    load: dict[str, np.ndarray], before: Placement, after: Placement, c: ModelConfig, layout: Layout
) -> Move:
    """Describes the effect of changing the placement from `before` to `after`."""
    return Move(
        moved=sum(count_moved(before[stack], after[stack], layout.expert_ranks) for stack in before),
        slots=sum(table.size for table in before.values()),
        before=balance(load, before, c, layout),
        after=balance(load, after, c, layout),
    )


def relocate_experts(
    weights: Weights, before: Placement, after: Placement, c: ModelConfig, layout: Layout, runner: Runner
) -> Weights:
    """Moves experts to the slots of another placement, and returns the weights.

    Each rank's experts are collected from the ranks that have them. Shapes, types and shardings stay the
    same, so no program is compiled again. The old experts are kept until the new ones are complete: both are
    in memory at that time.
    """
    slots = tables(c, layout, after)
    stacks = {"moe": weights.moe, "mtp": None if weights.mtp is None else weights.mtp.layer}
    old = {name: split_experts(stack)[1] for name, stack in stacks.items() if stack is not None}

    def make(leaf: Leaf) -> Any:
        if leaf.kind == "slots":
            return runner.put(table_of(leaf, slots), leaf_spec(c, leaf, layout))
        if leaf.experts:
            array = getattr(old[leaf.stack], leaf.path.rsplit(".", 1)[1])
            if leaf.kind in ("int8", "scale"):
                array = array.q if leaf.kind == "int8" else array.scale
            spec = leaf_spec(c, leaf, layout)
            return _reorder(array, leaf, before[leaf.stack], after[leaf.stack], spec, runner)
        return None

    new = laid_out(c, layout, make, weights.mtp is not None)
    return jax.tree.map(
        lambda a, b: a if b is None else b,
        weights,
        new,
        is_leaf=lambda x: x is None or isinstance(x, jax.Array),
    )


def _reorder(array: Any, leaf: Leaf, before: np.ndarray, after: np.ndarray, spec: P, runner: Runner) -> Any:
    """Reorders an array `[X, L, ...]` of experts for another placement."""
    # keyed by the shard's slice of the other axes, then by its first slot
    shards: dict[Any, dict[int, np.ndarray]] = {}
    for shard in array.addressable_shards:
        parts = shards.setdefault(_slice_key(shard.index[1:], leaf), {})
        parts[shard.index[0].start or 0] = np.asarray(shard.data)
    starts = np.array(sorted(next(iter(shards.values()))))
    slot_of = [{int(expert): slot for slot, expert in enumerate(row)} for row in before]

    def piece(slot: int, layer: int, parts: dict[int, np.ndarray]) -> np.ndarray | int:
        expert = int(after[layer, slot])
        if expert == before[layer, slot]:
            source = slot
        elif expert < 0:
            return 0
        else:
            source = slot_of[layer][expert]
        start = int(starts[np.searchsorted(starts, source, side="right") - 1])
        return parts[start][source - start, layer]

    def part(index: tuple[slice, ...]) -> np.ndarray:
        slots = range(*index[0].indices(leaf.shape[0]))
        parts = shards[_slice_key(index[1:], leaf)]
        out = np.empty((len(slots), *parts[int(starts[0])].shape[1:]), array.dtype)
        for i, slot in enumerate(slots):
            for layer in range(leaf.shape[1]):
                out[i, layer] = piece(slot, layer, parts)
        return out

    return runner.make(leaf.shape, array.dtype, spec, part)


def _slice_key(index: tuple[slice, ...], leaf: Leaf) -> tuple[tuple[int, int, int], ...]:
    """Slices of the axes after the one of slots, in a form that can be compared."""
    return tuple(s.indices(n) for s, n in zip(index, leaf.shape[1:], strict=True))
