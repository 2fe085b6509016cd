"""The collectives of a trace as a matrix of bytes between ranks, and between nodes.

Bytes are those of `ops/collective.py`, spread as its algorithms spread them. In all but two operations a rank
sends each peer of its group the same number of bytes: the peer's part (all_to_all, reduce_scatter), its own
part (all_gather), or both one after the other (all_reduce). A permute's bytes go along its pairs; a
broadcast's go from rank to rank, in the group's order.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise

import numpy as np
from jaxtyping import Float

from cmx_jax.errors import CmxError
from cmx_jax.mesh.supernode import Supernode
from cmx_jax.mesh.trace.ops.collective import Collective
from cmx_jax.mesh.trace.ops.place import groups_of


def traffic(collectives: Iterable[Collective], axes: Mapping[str, int]) -> Float[np.ndarray, "ranks ranks"]:
    """Returns the bytes that each rank sends to each other rank in one run; rows are senders.

    A row sums to the wire bytes of all executions, exactly if a peer's part is a whole number of bytes; where
    only some ranks send (permute, broadcast), the mean of the row sums does.

    Args:
      collectives: Collectives of a program, such as `Trace.contents.collectives`.
      axes: Names and sizes of the mesh axes, outermost first; ranks are numbered row by row.

    Raises:
      CmxError: A collective has neither groups nor mesh axes, or a permute no pairs.
    """
    ranks = math.prod(axes.values())
    sent = np.zeros((ranks, ranks))
    for c in collectives:
        wire = c.known * c.wire_bytes
        if c.pairs is not None:
            _pass_on(sent, c.pairs, wire)
            continue
        for group in _groups(c, axes):
            if c.op == "broadcast":
                _pass_on(sent, list(pairwise(group)), wire * len(group) / ranks)
            elif len(group) > 1:
                sent[np.ix_(group, group)] += _evenly(len(group), wire)
    return sent


def by_node(
    sent: Float[np.ndarray, "ranks ranks"], machine: Supernode, ranks_per_npu: int = 1, first_npu: int = 0
) -> Float[np.ndarray, "nodes nodes"]:
    """Sums the bytes between ranks to bytes between nodes, up to the last node that has a rank.

    Bytes that stay within a node are on the diagonal.

    Args:
      sent: Bytes between ranks; rows are senders.
      machine: Supernode whose nodes the ranks fill one after another.
      ranks_per_npu: Number of ranks per NPU: 2 where a rank is a die.
      first_npu: NPU of rank 0.
    """
    nodes = np.array([machine.node_of(first_npu + rank // ranks_per_npu) for rank in range(len(sent))])
    folded = np.zeros((nodes.max() + 1,) * 2)
    np.add.at(folded, (nodes[:, None], nodes[None, :]), sent)
    return folded


def _evenly(size: int, wire_bytes: float) -> Float[np.ndarray, "size size"]:
    """Returns the bytes within a group of `size` ranks that each send the same to every peer."""
    block = np.full((size, size), wire_bytes / (size - 1))
    np.fill_diagonal(block, 0)
    return block


def _pass_on(sent: Float[np.ndarray, "ranks ranks"], pairs: Sequence[Sequence[int]], mean: float) -> None:
    """Adds the same number of bytes along each pair; `mean` is the mean over all ranks."""
    moving = [(source, target) for source, target in pairs if source != target]
    for source, target in moving:
        sent[source, target] += mean * len(sent) / len(moving)


def _groups(c: Collective, axes: Mapping[str, int]) -> Sequence[Sequence[int]]:
    if c.groups is None and (not c.axes or c.op == "permute"):
        raise CmxError(
            f"a collective ({c.op}, scope {c.scope!r}) has no ranks, expected groups, pairs or mesh axes"
        )
    return c.groups or groups_of(c.axes, dict(axes))
