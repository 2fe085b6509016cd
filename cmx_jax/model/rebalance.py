"""Placements of a model's experts, stack by stack, and moving experts from one placement to another."""

from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from cmx_jax.mesh.eplb import balancedness
from cmx_jax.mesh.layout import Layout
from cmx_jax.mesh.placement import SlotTable, count_moved, place, replicas, slot_table, spread_evenly
from cmx_jax.mesh.runners import Runner
from cmx_jax.model.config import ModelConfig
from cmx_jax.model.sharding import laid_out, leaf_spec, shared_in_slots
from cmx_jax.model.weights import Leaf, Weights, split_experts

Placement = dict[str, np.ndarray]
"""Of each stack with MoE layers (`moe`, `mtp`) the expert of each slot, int32 [L, X]."""


def placed_experts(c: ModelConfig, layout: Layout) -> int:
    """Experts that have slots: the routed ones, and under `shared_slots` the shared ones."""
    return c.n_routed_experts + shared_in_slots(c, layout)


def initial(c: ModelConfig, layout: Layout, mtp: bool) -> Placement:
    """Where experts lie while no load is known. `mtp`: whether the weights have MTP layers.

    Raises:
      CmxError: they do not fit the layout's slots.
    """
    layers = {"moe": c.num_moe_layers, "mtp": c.num_nextn_predict_layers if mtp else 0}
    if not layout.replicated:
        return {stack: spread_evenly(n, c.n_routed_experts, layout) for stack, n in layers.items() if n}
    return balanced({stack: np.ones((n, c.n_routed_experts)) for stack, n in layers.items() if n}, c, layout)


def balanced(load: dict[str, np.ndarray], c: ModelConfig, layout: Layout) -> Placement:
    """EPLB's placement for measured loads, `[L, E]` of each stack.

    Raises:
      CmxError: the experts do not fill the layout's slots.
    """
    shared = shared_in_slots(c, layout)
    return {
        stack: place(of, layout, top_k=c.num_experts_per_tok, groups=c.n_group, shared_experts=shared)
        for stack, of in load.items()
    }


def tables(c: ModelConfig, layout: Layout, placement: Placement) -> dict[str, SlotTable]:
    """What the router reads of each stack's placement."""
    count = placed_experts(c, layout)
    return {stack: slot_table(expert_of_slot, count) for stack, expert_of_slot in placement.items()}


def table_of(leaf: Leaf, found: dict[str, SlotTable]) -> np.ndarray:
    """What a leaf of kind `slots` holds."""
    table = found[leaf.stack]
    return table.slots if leaf.path.endswith(".slots") else table.first


def balance(load: dict[str, np.ndarray], placement: Placement, c: ModelConfig, layout: Layout) -> float:
    """Balancedness (mean over most loaded rank) of a placement under a load, mean over layers."""
    count, found = placed_experts(c, layout), []
    for stack, expert_of_slot in placement.items():
        routed = load[stack].astype(np.float64)
        every = routed.sum(axis=1, keepdims=True) / max(c.num_experts_per_tok, 1)
        whole = np.concatenate([routed, np.repeat(every, count - routed.shape[1], axis=1)], axis=1)
        found.append(
            balancedness(whole, expert_of_slot, replicas(expert_of_slot, count), layout.expert_ranks)
        )
    return float(np.concatenate(found).mean()) if found else 1.0


@dataclass(frozen=True)
class Move:
    """What a rebalancing did.

    Attributes:
      moved: slots, over all layers, that got an expert from another rank.
      slots: all of them.
      before, after: balancedness under the load that it was fed with.
    """

    moved: int
    slots: int
    before: float
    after: float


def describe(
    load: dict[str, np.ndarray], before: Placement, after: Placement, c: ModelConfig, layout: Layout
) -> Move:
    """The report of a move."""
    return Move(
        moved=sum(count_moved(before[stack], after[stack], layout.expert_ranks) for stack in before),
        slots=sum(table.size for table in before.values()),
        before=balance(load, before, c, layout),
        after=balance(load, after, c, layout),
    )


def rehoused(
    weights: Weights, before: Placement, after: Placement, c: ModelConfig, layout: Layout, runner: Runner
) -> Weights:
    """The same weights with their experts in other slots: each rank's experts are put together from those of
    the ranks that held them. Shapes, types and shardings stay, so no program is compiled anew.

    The old experts stay until the new ones are there: both are in memory then.
    """
    slots = tables(c, layout, after)
    stacks = {"moe": weights.moe, "mtp": None if weights.mtp is None else weights.mtp.layer}
    old = {name: split_experts(stack)[1] for name, stack in stacks.items() if stack is not None}

    def make(leaf: Leaf) -> Any:
        if leaf.kind == "slots":
            return runner.put(table_of(leaf, slots), leaf_spec(leaf, layout))
        if leaf.experts:
            array = getattr(old[leaf.stack], leaf.path.rsplit(".", 1)[1])
            if leaf.kind in ("int8", "scale"):
                array = array.q if leaf.kind == "int8" else array.scale
            return _regathered(array, leaf, before[leaf.stack], after[leaf.stack], layout, runner)
        return None

    new = laid_out(c, layout, make, weights.mtp is not None)
    return jax.tree.map(
        lambda a, b: a if b is None else b,
        weights,
        new,
        is_leaf=lambda x: x is None or isinstance(x, jax.Array),
    )


def _regathered(
    array: Any, leaf: Leaf, before: np.ndarray, after: np.ndarray, layout: Layout, runner: Runner
) -> Any:
    """An experts' array `[X, L, ...]` in the order of another placement."""
    held_of: dict[Any, dict[int, np.ndarray]] = {}  # by what of the other axes a rank holds, and first slot
    for shard in array.addressable_shards:
        held_of.setdefault(_cuts(shard.index[1:], leaf), {})[shard.index[0].start or 0] = np.asarray(
            shard.data
        )
    starts = np.array(sorted(next(iter(held_of.values()))))
    where = [{int(expert): slot for slot, expert in enumerate(row)} for row in before]

    def piece(slot: int, layer: int, parts: dict[int, np.ndarray]) -> np.ndarray | int:
        expert = int(after[layer, slot])
        if expert == before[layer, slot]:
            source = slot
        elif expert < 0:
            return 0
        else:
            source = where[layer][expert]
        start = int(starts[np.searchsorted(starts, source, side="right") - 1])
        return parts[start][source - start, layer]

    def part(index: tuple[slice, ...]) -> np.ndarray:
        held = range(*index[0].indices(leaf.shape[0]))
        parts = held_of[_cuts(index[1:], leaf)]
        out = np.empty((len(held), *parts[int(starts[0])].shape[1:]), array.dtype)
        for i, slot in enumerate(held):
            for layer in range(leaf.shape[1]):
                out[i, layer] = piece(slot, layer, parts)
        return out

    return runner.make(leaf.shape, array.dtype, leaf_spec(leaf, layout), part)


def _cuts(index: tuple[slice, ...], leaf: Leaf) -> tuple[tuple[int, int, int], ...]:
    """Slices of the axes behind that of the slots, to compare."""
    return tuple(s.indices(n) for s, n in zip(index, leaf.shape[1:], strict=True))
