"""Positions of a collective's ranks on the supernode, and the boundaries that its messages cross."""

import math
from collections.abc import Iterable, Mapping
from functools import cache

import numpy as np

from cmx_jax.mesh.groups import Axes, Groups
from cmx_jax.mesh.supernode import Supernode


def groups_of(axes: tuple[str, ...], sizes: Mapping[str, int]) -> Groups:
    """Returns the ranks of each group of a collective over some mesh axes; ranks are numbered row by row."""
    return _groups_of(axes, tuple(sizes.items()))


@cache
def _groups_of(axes: tuple[str, ...], mesh: Axes) -> Groups:
    names, sizes = [name for name, _ in mesh], [size for _, size in mesh]
    ranks = np.arange(math.prod(sizes)).reshape(sizes)
    last = [names.index(axis) for axis in axes]
    first = [i for i in range(len(names)) if i not in last]
    width = math.prod(sizes[i] for i in last)
    return tuple(map(tuple, ranks.transpose([*first, *last]).reshape(-1, width).tolist()))


def plane(
    groups: Iterable[Iterable[int]], machine: Supernode, ranks_per_npu: int = 1, first_npu: int = 0
) -> str:
    """Returns the widest boundary that a message of any group crosses.

    Args:
      groups: Ranks of each group.
      machine: Supernode that the ranks run on.
      ranks_per_npu: Number of ranks per NPU: 1, or 2 where a rank is a die.
      first_npu: NPU of rank 0.

    Returns:
      `die pair`, `node` (UB or NVLink within a node), `nodes` (UB across nodes), or `RDMA` beyond the
      supernode (a node of H800s is a supernode by itself).
    """
    widest = 0
    for group in groups:
        npus = {first_npu + rank // ranks_per_npu for rank in group}
        nodes = {machine.node_of(npu) for npu in npus}
        supernodes = {machine.supernode_of(npu) for npu in npus}
        width = 0 if len(npus) == 1 else 1 if len(nodes) == 1 else 2 if len(supernodes) == 1 else 3
        widest = max(widest, width)
    return ("die pair", "node", "nodes", "RDMA")[widest]
