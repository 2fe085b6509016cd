"""Who sends how much to whom: a trace's collectives as a matrix of ranks, and folded to nodes.

Bytes are those of `collective.py`, spread as its algorithms spread them. In all but two operations a rank
sends each peer of its group the same: its part for it (all_to_all, reduce_scatter), its whole part
(all_gather), or one after the other (all_reduce). A permute's bytes go along its pairs; a broadcast's from
rank to rank, in the group's order.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
from jaxtyping import Float

from cmx_jax.errors import CmxError
from cmx_jax.mesh.supernode import Supernode
from cmx_jax.mesh.trace.place import Groups, groups_of


def traffic(
    collectives: Iterable[Mapping[str, Any]], axes: tuple[tuple[str, int], ...]
) -> Float[np.ndarray, "R R"]:
    """Bytes that each rank sends to each other in one run; rows are senders.

    A row sums to `wire_bytes` of all collectives, exactly where a peer's part is a whole number of bytes;
    where only some ranks send (permute, broadcast), the mean of the rows does.

    Args:
      collectives: of a `Trace`.
      axes: names and sizes of the mesh, outermost first: ranks are numbered row by row.

    Raises:
      CmxError: a collective does not say between which ranks it is.
    """
    ranks = math.prod(size for _, size in axes)
    sent = np.zeros((ranks, ranks))
    for row in collectives:
        if row["op"] == "permute":
            _pass_on(sent, _pairs(row), row["wire_bytes"])
            continue
        for group in _groups(row, dict(axes)):
            if row["op"] == "broadcast":
                _pass_on(sent, list(pairwise(group)), row["wire_bytes"] * len(group) / ranks)
            elif len(group) > 1:
                sent[np.ix_(group, group)] += _evenly(len(group), row["wire_bytes"])
    return sent


def by_node(
    sent: Float[np.ndarray, "R R"], machine: Supernode, ranks_per_npu: int = 1, first_npu: int = 0
) -> Float[np.ndarray, "N N"]:
    """The same between nodes, of which there are as many as ranks reach; what stays in a node is on the
    diagonal.

    Args:
      sent: between ranks.
      machine: whose nodes the ranks sit on, node by node.
      ranks_per_npu: 2 where a rank is a die.
      first_npu: on which rank 0 sits.
    """
    nodes = np.array([machine.node_of(first_npu + rank // ranks_per_npu) for rank in range(len(sent))])
    folded = np.zeros((nodes.max() + 1,) * 2)
    np.add.at(folded, (nodes[:, None], nodes[None, :]), sent)
    return folded


def _evenly(size: int, wire_bytes: float) -> Float[np.ndarray, "G G"]:
    block = np.full((size, size), wire_bytes / (size - 1))
    np.fill_diagonal(block, 0)
    return block


def _pass_on(sent: Float[np.ndarray, "R R"], pairs: Sequence[Sequence[int]], mean: float) -> None:
    """Adds the same along each pair, `mean` being that of all ranks."""
    moving = [(source, target) for source, target in pairs if source != target]
    for source, target in moving:
        sent[source, target] += mean * len(sent) / len(moving)


def _groups(row: Mapping[str, Any], sizes: dict[str, int]) -> Groups:
    if "groups" in row:
        return row["groups"]
    if not row["axes"]:
        raise CmxError(f"an {row['op']} in scope {row['scope']!r} does not say between which ranks it is")
    return groups_of(tuple(row["axes"]), sizes)


def _pairs(row: Mapping[str, Any]) -> Sequence[Sequence[int]]:
    if "pairs" not in row:
        raise CmxError(f"a permute in scope {row['scope']!r} does not say between which ranks it is")
    return row["pairs"]
