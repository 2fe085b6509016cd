"""Expert-parallel load balancing: which experts get more slots, and where all of them lie.

DeepSeek's algorithm (github.com/deepseek-ai/EPLB, DeepSeek-V3 report section 3.4), step by step the same,
so that its outputs are the same: experts that are chosen more often are replicated, the replicas packed so
that ranks are loaded alike. With groups (`hierarchical`) the experts of a group stay on one node, as
group-limited routing likes.

Letters: `L` layers, `E` experts, `X` slots ("physical experts"), `R` most replicas of an expert.
"""

from typing import NamedTuple

import numpy as np

from cmx_jax.errors import CmxError


class Rebalanced(NamedTuple):
    """A placement: `phy2log [L, X]`, `log2phy [L, E, R]` (-1: none), `logcnt [L, E]`; int64."""

    phy2log: np.ndarray
    log2phy: np.ndarray
    logcnt: np.ndarray


def pack(weight: np.ndarray, packs: int) -> tuple[np.ndarray, np.ndarray]:
    """Items into packs of equally many: heaviest first, each into the lightest pack that has room.

    Args:
      weight: float32 [L, n].
      packs: a divisor of `n`.

    Returns:
      The pack of each item and its place there, [L, n].
    """
    layers, count = weight.shape
    room = count // packs
    if room == 1:
        return np.tile(np.arange(packs), (layers, 1)), np.zeros((layers, count), np.int64)
    pack, place = np.zeros((layers, count), np.int64), np.zeros((layers, count), np.int64)
    order = np.argsort(-weight, axis=1, kind="stable")
    for layer in range(layers):
        loads, held = np.zeros(packs), np.zeros(packs, np.int64)
        for item in order[layer]:
            lightest = int(np.argmin(np.where(held < room, loads, np.inf)))
            pack[layer, item], place[layer, item] = lightest, held[lightest]
            loads[lightest] += float(weight[layer, item])
            held[lightest] += 1
    return pack, place


def replicate(weight: np.ndarray, slots: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Gives each further slot to the expert whose replicas are loaded most.

    Returns:
      Expert of each slot [L, X], which of its replicas that is [L, X], replicas of each expert [L, E].
    """
    layers, experts = weight.shape
    every = np.arange(layers)
    expert, replica = np.tile(np.arange(slots), (layers, 1)), np.zeros((layers, slots), np.int64)
    count = np.ones((layers, experts), np.int64)
    for slot in range(experts, slots):
        busiest = np.argmax(weight / count.astype(np.float32), axis=1)
        expert[:, slot], replica[:, slot] = busiest, count[every, busiest]
        count[every, busiest] += 1
    return expert, replica, count


def _inverse(permutation: np.ndarray) -> np.ndarray:
    inverse = np.empty_like(permutation)
    np.put_along_axis(inverse, permutation, np.arange(permutation.shape[1])[None], axis=1)
    return inverse


def _hierarchical(
    weight: np.ndarray, slots: int, groups: int, nodes: int, ranks: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Groups to nodes, replicas within a node, slots to ranks. Slot -> expert, replica; expert -> count."""
    layers, experts = weight.shape
    size, per_node = experts // groups, experts // nodes
    loads = weight.reshape(layers, groups, size).sum(axis=-1, dtype=np.float32)
    node, place = pack(loads, nodes)
    first = (node * (groups // nodes) + place) * size
    placed_of = (first[:, :, None] + np.arange(size)).reshape(layers, experts)  # expert -> number by node
    expert_of = _inverse(placed_of)
    by_node = np.take_along_axis(weight, expert_of, axis=1).reshape(-1, per_node)
    local, replica, count = replicate(by_node, slots // nodes)
    shares = np.take_along_axis(by_node / count.astype(np.float32), local, axis=1)
    rank, place = pack(shares, ranks // nodes)
    slot_of = _inverse(rank * (slots // ranks) + place)
    local = np.take_along_axis(local, slot_of, axis=1).reshape(layers, nodes, -1)
    placed = (local + np.arange(0, experts, per_node)[None, :, None]).reshape(layers, slots)
    replica = np.take_along_axis(replica, slot_of, axis=1).reshape(layers, slots)
    counts = np.take_along_axis(count.reshape(layers, experts), placed_of, axis=1)
    return np.take_along_axis(expert_of, placed, axis=1), replica, counts


def rebalance_experts(
    weight: np.ndarray, num_replicas: int, num_groups: int, num_nodes: int, num_gpus: int
) -> Rebalanced:
    """A placement for measured loads, with DeepSeek's names and outputs.

    Args:
      weight: load of each expert, [L, E], not negative.
      num_replicas: slots `X` over all ranks.
      num_groups: expert groups of the router; if nodes do not divide them, the placement is global.
      num_nodes: nodes of the instance.
      num_gpus: its ranks.

    Raises:
      CmxError: sizes that do not divide, fewer slots than experts, loads that are none.
    """
    weight = np.asarray(weight)
    if weight.ndim != 2 or not np.issubdtype(weight.dtype, np.number) or 0 in weight.shape:
        raise CmxError(f"loads are {weight.dtype} {list(weight.shape)}, expected numbers [layers, experts]")
    weight = weight.astype(np.float32)
    if not np.isfinite(weight).all() or (weight < 0).any():
        raise CmxError("loads hold NaN, infinity or negative numbers, expected how often experts are chosen")
    experts = weight.shape[1]
    grouped = num_groups > 0 and num_nodes > 0 and num_groups % num_nodes == 0
    groups, nodes = (num_groups, num_nodes) if grouped else (1, 1)
    for what, number, divisor in (
        ("num_gpus", num_gpus, nodes),
        ("num_replicas", num_replicas, num_gpus),
        ("experts", experts, groups),
    ):
        if number < 1 or divisor < 1 or number % divisor:
            raise CmxError(f"{what} is {number}, expected a multiple of {divisor}")
    if num_replicas < experts:
        raise CmxError(f"num_replicas is {num_replicas}, expected at least the {experts} experts")
    expert, replica, count = _hierarchical(weight, num_replicas, groups, nodes, num_gpus)
    slots = np.full((weight.shape[0], experts, int(count.max())), -1, np.int64)
    layer = np.arange(weight.shape[0])[:, None]
    slots[layer, expert, replica] = np.arange(num_replicas)[None]
    return Rebalanced(expert, slots, count)


def balancedness(load: np.ndarray, phy2log: np.ndarray, logcnt: np.ndarray, ranks: int) -> np.ndarray:
    """Mean over most loaded rank, for each layer: 1 is perfect, `1 / ranks` the worst.

    Args:
      load: tokens of each expert, [L, E]; replicas share evenly.
      phy2log: expert of each slot, [L, X]; -1 is an empty slot.
      logcnt: replicas of each expert, [L, E].
      ranks: each holds `X / ranks` consecutive slots.
    """
    share = np.take_along_axis(load / logcnt, np.maximum(phy2log, 0), axis=1)
    by_rank = np.where(phy2log < 0, 0.0, share).reshape(load.shape[0], ranks, -1).sum(axis=-1)
    most = by_rank.max(axis=-1)
    return np.where(most > 0, by_rank.mean(axis=-1) / np.where(most > 0, most, 1), 1.0)
