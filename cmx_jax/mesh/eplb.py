"""Expert-parallel load balancing (EPLB): replicates busy experts and packs replicas onto ranks.

DeepSeek's algorithm (github.com/deepseek-ai/EPLB, DeepSeek-V3 report section 3.4), the same step by step, so
that its outputs are the same. Experts that are chosen more often are replicated, and replicas are packed so
that ranks have equal loads. With groups (`_hierarchical`) the experts of a group stay on one node, which
suits group-limited routing.

Letters in shapes: `L` layers, `E` experts, `X` slots ("physical experts").
"""

from typing import NamedTuple

import numpy as np

from cmx_jax.errors import CmxError


class Rebalanced(NamedTuple):
    """A placement, in DeepSeek's names. All arrays are int64.

    Attributes:
      phy2log: Expert of each slot, [L, X].
      log2phy: Slots of each expert, [L, E, replicas], -1 for none. The last dimension is the most
        replicas that an expert has.
      logcnt: Number of replicas of each expert, [L, E].
    """

    phy2log: np.ndarray
    log2phy: np.ndarray
    logcnt: np.ndarray


def balanced_packing(weight: np.ndarray, packs: int) -> tuple[np.ndarray, np.ndarray]:
    """Distributes items over packs of equal size: heaviest first, each into the lightest pack with room.

    Args:
      weight: Weight of each item, float32 [L, items].
      packs: Number of packs, a divisor of the number of items.

    Returns:
      Pack of each item and the item's position in it, [L, items].
    """
    layers, count = weight.shape
    room = count // packs
    if room == 1:
        return np.tile(np.arange(packs), (layers, 1)), np.zeros((layers, count), np.int64)
    pack, place = np.zeros((layers, count), np.int64), np.zeros((layers, count), np.int64)
    order = np.argsort(-weight, axis=1, kind="stable")
    for layer in range(layers):
        loads, counts = np.zeros(packs), np.zeros(packs, np.int64)
        for item in order[layer]:
            lightest = int(np.argmin(np.where(counts < room, loads, np.inf)))
            pack[layer, item], place[layer, item] = lightest, counts[lightest]
            loads[lightest] += float(weight[layer, item])
            counts[lightest] += 1
    return pack, place


def replicate_experts(weight: np.ndarray, slots: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Gives each further slot to the expert whose replicas have the largest load.

    Args:
      weight: Load of each expert, float32 [L, E].
      slots: Number of slots `X`.

    Returns:
      Expert of each slot [L, X], number of the replica in each slot [L, X], replicas of each expert [L, E].
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
    """Packs groups onto nodes, replicates experts within a node, packs slots onto ranks.

    Returns:
      As `replicate_experts`.
    """
    layers, experts = weight.shape
    size, per_node = experts // groups, experts // nodes
    loads = weight.reshape(layers, groups, size).sum(axis=-1, dtype=np.float32)
    node, position = balanced_packing(loads, nodes)
    first = (node * (groups // nodes) + position) * size
    placed_of = (first[:, :, None] + np.arange(size)).reshape(layers, experts)  # expert -> number by node
    expert_of = _inverse(placed_of)
    by_node = np.take_along_axis(weight, expert_of, axis=1).reshape(-1, per_node)
    local, replica, count = replicate_experts(by_node, slots // nodes)
    shares = np.take_along_axis(by_node / count.astype(np.float32), local, axis=1)
    rank, position = balanced_packing(shares, ranks // nodes)
    slot_of = _inverse(rank * (slots // ranks) + position)
    local = np.take_along_axis(local, slot_of, axis=1).reshape(layers, nodes, -1)
    placed = (local + np.arange(0, experts, per_node)[None, :, None]).reshape(layers, slots)
    replica = np.take_along_axis(replica, slot_of, axis=1).reshape(layers, slots)
    counts = np.take_along_axis(count.reshape(layers, experts), placed_of, axis=1)
    return np.take_along_axis(expert_of, placed, axis=1), replica, counts


def rebalance_experts(
    weight: np.ndarray, num_replicas: int, num_groups: int, num_nodes: int, num_gpus: int
) -> Rebalanced:
    """Computes a placement for measured loads, with DeepSeek's names and outputs.

    Args:
      weight: Load of each expert, [L, E], not negative.
      num_replicas: Number of slots `X` on all ranks.
      num_groups: Number of expert groups of the router. If nodes do not divide them, the placement is global.
      num_nodes: Number of nodes of the instance.
      num_gpus: Number of ranks of the instance.

    Raises:
      CmxError: Sizes do not divide, there are fewer slots than experts, or loads are negative or not finite.
    """
    weight = np.asarray(weight)
    if weight.ndim != 2 or not np.issubdtype(weight.dtype, np.number) or 0 in weight.shape:
        raise CmxError(f"loads are {weight.dtype} {list(weight.shape)}, expected numbers [layers, experts]")
    weight = weight.astype(np.float32)
    if not np.isfinite(weight).all() or (weight < 0).any():
        raise CmxError("loads hold NaN, infinity or negative numbers, expected counts of chosen experts")
    experts = weight.shape[1]
    grouped = num_groups > 0 and num_nodes > 0 and num_groups % num_nodes == 0
    groups, nodes = (num_groups, num_nodes) if grouped else (1, 1)
    for name, number, divisor in (
        ("num_gpus", num_gpus, nodes),
        ("num_replicas", num_replicas, num_gpus),
        ("experts", experts, groups),
    ):
        if number < 1 or divisor < 1 or number % divisor:
            raise CmxError(f"{name} is {number}, expected a multiple of {divisor}")
    if num_replicas < experts:
        raise CmxError(f"num_replicas is {num_replicas}, expected at least the {experts} experts")
    expert, replica, count = _hierarchical(weight, num_replicas, groups, nodes, num_gpus)
    slots = np.full((weight.shape[0], experts, int(count.max())), -1, np.int64)
    layer = np.arange(weight.shape[0])[:, None]
    slots[layer, expert, replica] = np.arange(num_replicas)[None]
    return Rebalanced(expert, slots, count)


def balancedness(load: np.ndarray, phy2log: np.ndarray, logcnt: np.ndarray, ranks: int) -> np.ndarray:
    """Mean load of a rank over the largest load of a rank: 1 is perfect, `1 / ranks` the worst.

    Args:
      load: Tokens of each expert, [L, E], which its replicas share evenly.
      phy2log: Expert of each slot, [L, X]; -1 for an empty slot.
      logcnt: Number of replicas of each expert, [L, E].
      ranks: Number of ranks, each of which holds `X / ranks` consecutive slots.

    Returns:
      Balancedness of each layer, [L].
    """
    share = np.take_along_axis(load / logcnt, np.maximum(phy2log, 0), axis=1)
    by_rank = np.where(phy2log < 0, 0.0, share).reshape(load.shape[0], ranks, -1).sum(axis=-1)
    largest = by_rank.max(axis=-1)
    return np.where(largest > 0, by_rank.mean(axis=-1) / np.where(largest > 0, largest, 1), 1.0)
