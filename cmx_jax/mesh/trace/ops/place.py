"""Positions of a collective's ranks on the supernode, and the boundaries that its messages cross."""

from collections.abc import Iterable

import numpy as np

from cmx_jax.mesh.supernode import Supernode

Groups = Iterable[Iterable[int]]


def groups_of(axes: tuple[str, ...], sizes: dict[str, int]) -> list[list[int]]:
    """Returns the ranks of each group of a collective over some mesh axes; ranks are numbered row by row."""
    names = list(sizes)
    ranks = np.arange(int(np.prod(list(sizes.values())))).reshape(list(sizes.values()))
    last = [names.index(axis) for axis in axes]
    first = [i for i in range(len(names)) if i not in last]
    width = int(np.prod([sizes[axis] for axis in axes]))
    return ranks.transpose([*first, *last]).reshape(-1, width).tolist()


def plane(groups: Groups, machine: Supernode, ranks_per_npu: int = 1, first_npu: int = 0) -> str:
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
