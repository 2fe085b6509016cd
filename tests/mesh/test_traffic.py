"""Traffic between ranks: sums are the wire bytes of the trace, patterns those of the operations."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from cmx_jax.errors import CmxError
from cmx_jax.mesh import CLOUDMATRIX384
from cmx_jax.mesh.jax_versions import auto_mesh
from cmx_jax.mesh.trace import Trace, trace
from cmx_jax.mesh.trace.ops.collective import Collective
from cmx_jax.mesh.trace.traffic import by_node, traffic

AXES = {"node": 4, "npu": 8}
BOTH = P(("node", "npu"))


def traced(fn: Any) -> Trace:
    """Traces a function of an array with 4,096 bytes, `[32, 32] float32`, on each rank."""
    mesh = auto_mesh(tuple(AXES.items()))
    mapped = jax.shard_map(fn, mesh=mesh, in_specs=BOTH, out_specs=BOTH, check_vma=False)
    return trace(mapped, jax.ShapeDtypeStruct((32 * 32, 32), jnp.dtype("float32")))


def everything(x: Any) -> Any:
    def inner(x: Any, _: Any) -> Any:
        x = lax.all_to_all(x, ("node", "npu"), 0, 0, tiled=True)
        return lax.psum_scatter(lax.all_gather(x, "npu", tiled=True), "npu", tiled=True), None

    pairs = [[0, 1], [2, 3], [4, 5], [6, 7]]
    x = lax.scan(inner, x, None, length=5)[0]
    return lax.psum_scatter(
        lax.all_gather(lax.psum(x, "node"), "npu", axis_index_groups=pairs, tiled=True),
        "npu",
        axis_index_groups=pairs,
        tiled=True,
    )


def test_rows_sum_to_wire_bytes() -> None:
    result = traced(everything)
    sent = traffic(result.contents.collectives, AXES)
    assert {c["op"] for c in result.collectives} == {
        "all_to_all",
        "all_gather",
        "reduce_scatter",
        "all_reduce",
    }
    assert sent.sum(axis=1).tolist() == [sum(c["wire_bytes"] for c in result.collectives)] * 32
    assert not np.diag(sent).any()
    nodes = by_node(sent, CLOUDMATRIX384)
    assert nodes.shape == (4, 4)
    assert nodes.sum() == sent.sum()
    assert nodes[1, 3] == sent[8:16, 24:32].sum()


def test_gather_stays_in_its_group() -> None:
    sent = traffic(traced(lambda x: lax.psum_scatter(x, "npu", tiled=True)).contents.collectives, AXES)
    inside = np.kron(np.eye(4), np.ones((8, 8)) - np.eye(8))
    assert (sent == inside * 4096 / 8).all()


def test_permute_bytes_follow_pairs() -> None:
    chain = [(i, i + 1) for i in range(3)]
    sent = traffic(traced(lambda x: lax.ppermute(x, "node", chain)).contents.collectives, AXES)
    expected = np.zeros((32, 32))
    for rank in range(24):
        expected[rank, rank + 8] = 4096
    assert (sent == expected).all()


def test_dies_of_an_npu_are_in_one_node() -> None:
    result = traced(lambda x: lax.all_to_all(x, ("node", "npu"), 0, 0, tiled=True))
    nodes = by_node(traffic(result.contents.collectives, AXES), CLOUDMATRIX384, ranks_per_npu=2, first_npu=4)
    part = 4096 / 32
    assert nodes.tolist() == [  # 8 dies of node 0, 16 of node 1, 8 of node 2
        [8 * 7 * part, 8 * 16 * part, 8 * 8 * part],
        [16 * 8 * part, 16 * 15 * part, 16 * 8 * part],
        [8 * 8 * part, 8 * 16 * part, 8 * 7 * part],
    ]


def test_broadcast_is_passed_on() -> None:
    sent = traffic([Collective("broadcast", ("npu",), 8, "int8", (800,), 1)], AXES)
    assert sent[:8, :8].tolist() == (np.eye(8, k=1) * 800).tolist()
    assert sent.sum() == 700 * 32


@pytest.mark.parametrize("source", ["jaxpr", "stablehlo", "hlo"])
def test_sources_agree_on_the_traffic(source: str) -> None:
    mesh = Mesh(np.array(jax.devices("cpu")[:8]).reshape(2, 4), ("node", "npu"))

    def program(x: Any) -> Any:
        x = lax.ppermute(x, "npu", [(i, (i + 1) % 4) for i in range(4)])
        return lax.all_to_all(x, "node", 0, 0, tiled=True)

    mapped = jax.shard_map(program, mesh=mesh, in_specs=BOTH, out_specs=BOTH, check_vma=False)
    result = trace(mapped, jax.ShapeDtypeStruct((8 * 4, 32), jnp.dtype("float32")), source=source)
    ring, across = np.roll(np.eye(4), 1, axis=1), np.array([[0, 1], [1, 0]])
    expected = 512 * np.kron(np.eye(2), ring) + 256 * np.kron(across, np.eye(4))
    assert (traffic(result.contents.collectives, result.contents.axes) == expected).all()


@pytest.mark.parametrize("op", ["permute", "all_gather"])
def test_collective_without_ranks_is_refused(op: str) -> None:
    with pytest.raises(CmxError, match="has no ranks, expected groups, pairs or mesh axes"):
        traffic([Collective(op, (), 4, "int8", (4,), 1)], AXES)
