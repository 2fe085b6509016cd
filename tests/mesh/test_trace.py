"""Traces of typical programs, compared with closed forms of what their collectives move."""

from typing import Any

import jax
import jax.numpy as jnp
import optax
import pytest
from jax import lax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from cmx_jax.mesh import CLOUDMATRIX384, H800_NODE
from cmx_jax.mesh.jax_versions import auto_mesh
from cmx_jax.mesh.trace import Trace, View, render, trace
from cmx_jax.mesh.trace.ops.place import groups_of, plane

AXES = (("node", 4), ("npu", 8))
MESH = auto_mesh(AXES)
SOURCES = ("jaxpr", "stablehlo", "hlo")


def shape(*sizes: int, dtype: str = "float32") -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(sizes, jnp.dtype(dtype))


def devices() -> Mesh:
    return auto_mesh(AXES, jax.devices()[:32])


def mapped(fn: Any, ins: Any, outs: Any, source: str = "jaxpr") -> Any:
    """Maps a function over the mesh, which has devices only where a compiler needs them."""
    mesh = devices() if source == "hlo" else MESH
    return jax.jit(jax.shard_map(fn, mesh=mesh, in_specs=ins, out_specs=outs, check_vma=False))


def rows(t: Trace) -> list[tuple[Any, ...]]:
    """Operation, axes, plane, executions and wire bytes of each."""
    return [(r["op"], tuple(r["axes"]), r["plane"], r["count"], r["wire_bytes"]) for r in t.collectives]


def wire(t: Trace) -> dict[Any, float]:
    """Bytes by operation, axes and type: compilers put collectives together."""
    result: dict[Any, float] = {}
    for r in t.collectives:
        key = r["op"], tuple(r["axes"]), r["dtype"]
        result[key] = result.get(key, 0) + r["wire_bytes"]
    return result


@pytest.mark.parametrize("source", SOURCES)
def test_data_parallel_training_reduces_each_gradient_once(source: str) -> None:
    opt = optax.sgd(1e-3, momentum=0.9)
    params = {"w": shape(64, 16), "b": shape(16)}

    def step(params: Any, state: Any, x: Any, y: Any) -> Any:
        def loss(p: Any) -> Any:
            return jnp.mean(jnp.square(x @ p["w"] + p["b"][None] - y))

        grads = lax.pmean(jax.grad(loss)(params), ("node", "npu"))
        updates, state = opt.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    state = jax.eval_shape(opt.init, params)
    data = P(("node", "npu"))
    program = mapped(step, (P(), P(), data, data), P(), source)
    result = trace(program, params, state, shape(320, 64), shape(320, 16), source=source)
    axes, factor = ("node", "npu"), 2 * 31 / 32
    assert wire(result) == {("all_reduce", axes, "float32"): (64 + 1) * 16 * 4 * factor}
    assert {(r["plane"], r["count"]) for r in result.collectives} == {("nodes", 1)}
    forward = 2 * 10 * 64 * 16  # of one rank's ten rows; the gradient of w costs as much again
    assert result.flops == {"float32": 2 * forward}


@pytest.mark.parametrize("source", SOURCES)
def test_ring_attention_sends_keys_and_values_round_the_ring(source: str) -> None:
    def attend(q: Any, k: Any, v: Any) -> Any:
        ring = [(i, (i + 1) % 8) for i in range(8)]

        def turn(carry: Any, _: Any) -> Any:
            (k, v), out = carry
            out = out + jax.nn.softmax(q @ k.T) @ v
            return (lax.ppermute((k, v), "npu", ring), out), None

        with jax.named_scope("Ring"):
            (_, out), _ = lax.scan(turn, ((k, v), jnp.zeros_like(q)), None, length=8)
        return out

    x = shape(4 * 8 * 16, 32)
    spec = P(("node", "npu"))
    result = trace(mapped(attend, (spec,) * 3, spec, source), x, x, x, source=source)
    assert wire(result) == {("permute", ("npu",), "float32"): 2 * 8 * 16 * 32 * 4}
    assert {(r["plane"], r["count"], r["scope"]) for r in result.collectives} == {("node", 8, "Ring")}
    assert result.flops == {"float32": 8 * 2 * (2 * 16 * 16 * 32)}
    assert [note for note in result.notes if "only in" in note] == []


def test_wider_types_of_the_cpu_are_noted() -> None:
    program = mapped(lambda x: lax.all_to_all(x, "npu", 0, 0), (P(),), P(), "hlo")
    result = trace(program, shape(8, 64, dtype="bfloat16"), source="hlo")
    assert wire(result) == {("all_to_all", ("npu",), "float32"): 8 * 64 * 4 * 7 / 8}
    assert "bfloat16 as float32" in result.notes[-1]


@pytest.mark.parametrize("source", SOURCES)
def test_pipeline_last_stage_sends_nothing(source: str) -> None:
    def stages(x: Any, w: Any) -> Any:
        chain = [(i, i + 1) for i in range(3)]

        def tick(h: Any, _: Any) -> Any:
            return lax.ppermute(jnp.tanh(h @ w[0]), "node", chain), None

        return lax.scan(tick, x, None, length=7)[0]

    program = mapped(stages, (P("npu"), P("node")), P("npu"), source)
    result = trace(program, shape(64, 32), shape(4, 32, 32), source=source)
    assert rows(result) == [("permute", ("node",), "nodes", 7, 7 * 8 * 32 * 4 * 3 / 4)]


@pytest.mark.parametrize("source", SOURCES)
def test_matmul_with_sum_inserted_by_compiler(source: str) -> None:
    mesh = devices()
    left, right = (
        jax.ShapeDtypeStruct(sizes, jnp.float32, sharding=NamedSharding(mesh, spec))
        for sizes, spec in (((64, 512), P("node", "npu")), ((512, 128), P("npu")))
    )
    result = trace(jnp.matmul, left, right, source=source)
    if source == "hlo":
        assert wire(result) == {("all_reduce", ("npu",), "float32"): 16 * 128 * 4 * 2 * 7 / 8}
        assert result.flops == {"float32": 2 * 16 * 64 * 128}
        assert result.memory["arguments"] == (16 * 64 + 64 * 128) * 4
        assert any("only in hlo" in note for note in result.notes)
    else:
        assert not result.collectives
        assert result.flops == {"float32": 2 * 64 * 512 * 128}
        assert source != "jaxpr" or "source hlo" in result.notes[0]


@pytest.mark.parametrize("source", SOURCES)
def test_counts_of_nested_loops_branches_and_whiles(source: str) -> None:
    def program(x: Any, n: Any) -> Any:
        def inner(x: Any, _: Any) -> Any:
            return lax.all_to_all(x, "npu", 0, 0, tiled=True), None

        def outer(x: Any, _: Any) -> Any:
            x = lax.scan(inner, x, None, length=3)[0]
            return lax.cond(jnp.sum(x) > 0, lambda x: lax.psum(x, "npu"), lambda x: x, x), None

        x = lax.scan(outer, x, None, length=5)[0]
        return lax.fori_loop(0, n[0], lambda _, x: lax.pmax(x, "node"), x)

    spec = P(("node", "npu"))
    arguments = shape(32 * 8, 4), shape(1, dtype="int32")
    result = trace(mapped(program, (spec, P()), spec, source), *arguments, source=source)
    size = 8 * 4 * 4
    assert rows(result) == [
        ("all_to_all", ("npu",), "node", 15, 15 * size * 7 / 8),
        ("all_reduce", ("npu",), "node", None, 5 * size * 2 * 7 / 8),
        ("all_reduce", ("node",), "nodes", None, size * 2 * 3 / 4),
    ]
    assert result.notes


def test_equal_branches_have_a_count() -> None:
    def program(x: Any) -> Any:
        up, down = (lambda x, s=s: lax.all_gather(x * s, "npu", tiled=True) for s in (1.0, 2.0))
        return lax.cond(jnp.sum(x) > 0, up, down, x)

    result = trace(mapped(program, (P(("node", "npu")),), P("node")), shape(32 * 2, 4))
    assert rows(result) == [("all_gather", ("npu",), "node", 1, 2 * 4 * 4 * 7)]
    assert not result.notes


def test_gathers_scatters_and_groups() -> None:
    def program(x: Any) -> Any:
        pairs = [[0, 1], [2, 3], [4, 5], [6, 7]]
        y = lax.psum_scatter(x, ("node", "npu"), tiled=True)
        return lax.all_gather(y, "npu", axis_index_groups=pairs, tiled=True)

    result = trace(
        mapped(program, (P(),), P("node")), shape(320, 4, dtype="int8"), view=View(ranks_per_npu=2)
    )
    scatter, gather = result.collectives
    assert (scatter["op"], scatter["wire_bytes"], scatter["plane"]) == (
        "reduce_scatter",
        320 * 4 * 31 / 32,
        "nodes",
    )
    assert (gather["group_size"], gather["wire_bytes"]) == (2, 10 * 4)


@pytest.mark.parametrize(
    ("axes", "per_npu", "expected"),
    [(("npu",), 1, "node"), (("npu",), 2, "node"), (("node",), 1, "nodes"), (("node", "npu"), 1, "nodes")],
)
def test_planes_of_a_mesh_of_nodes(axes: tuple[str, ...], per_npu: int, expected: str) -> None:
    groups = groups_of(axes, {"node": 4, "npu": 8})
    assert sorted(rank for group in groups for rank in group) == list(range(32))
    assert plane(groups, CLOUDMATRIX384, per_npu) == expected


def test_planes_of_a_die_pair_and_beyond_the_supernode() -> None:
    assert plane([[0, 1], [2, 3]], CLOUDMATRIX384, 2) == "die pair"
    assert plane([[0, 384]], CLOUDMATRIX384) == "RDMA"


def test_planes_of_gpus_beyond_their_node() -> None:
    assert plane([[0, 7], [8, 15]], H800_NODE) == "node"
    assert plane([[0, 7], [7, 8]], H800_NODE) == "RDMA"


def test_table_has_line_for_each_collective() -> None:
    result = trace(mapped(lambda x: lax.psum(x, "npu"), (P(),), P()), shape(4))
    assert len(render(result).splitlines()) == 4
