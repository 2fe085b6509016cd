"""Programs on meshes of `Explicit` axes, `jax.make_mesh`'s default: all sources say what one rank moves."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jax import lax
from jax.sharding import AxisType, Mesh, NamedSharding, reshard
from jax.sharding import PartitionSpec as P

from cmx_jax.errors import CmxError
from cmx_jax.mesh.jax_versions import typed_mesh
from cmx_jax.mesh.trace import Trace, trace
from cmx_jax.testing import assert_collectives

AXES = (("x", 2), ("y", 4))
SOURCES = ("jaxpr", "stablehlo", "hlo")
WRITTEN = ("jaxpr", "stablehlo")


def on(mesh: Any, *sizes: int, split: P) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(sizes, jnp.float32, sharding=NamedSharding(mesh, split))


@pytest.fixture
def mesh() -> Mesh:
    return jax.make_mesh((2, 4), ("x", "y"), axis_types=(AxisType.Explicit,) * 2, devices=jax.devices()[:8])


def traced(mesh: Mesh, fn: Callable[..., Any], *args: Any, source: str) -> Trace:
    with jax.set_mesh(mesh):
        return trace(fn, *args, source=source)


def rows(t: Trace) -> list[tuple[Any, ...]]:
    return [(r["op"], tuple(r["axes"]), tuple(r["shape"]), r["count"]) for r in t.collectives]


def feed_forward(x: jax.Array, up: jax.Array, down: jax.Array) -> jax.Array:
    """A tensor-parallel layer whose second product is summed over `y`."""
    h = jnp.einsum("bd,df->bf", x, up)
    return jnp.einsum("bf,fd->bd", jax.nn.relu(h), down, out_sharding=P("x", None))


def layer_arguments(mesh: Any) -> tuple[Any, ...]:
    return (
        on(mesh, 8, 16, split=P("x", None)),
        on(mesh, 16, 32, split=P(None, "y")),
        on(mesh, 32, 16, split=P("y", None)),
    )


def test_tensor_parallel_layer_has_one_rank_s_flops_and_a_note(mesh: Mesh) -> None:
    result = traced(mesh, feed_forward, *layer_arguments(mesh), source="jaxpr")
    assert result.flops == {"float32": 2 * (2 * 4 * 16 * 8)}
    assert result.memory["arguments"] == 4 * (4 * 16 + 16 * 8 + 8 * 16)
    assert [note for note in result.notes if "1 x dot_general over y" in note]


def test_tensor_parallel_layer_in_hlo_is_the_same_and_has_the_sum(mesh: Mesh) -> None:
    result = traced(mesh, feed_forward, *layer_arguments(mesh), source="hlo")
    assert result.flops == {"float32": 2 * (2 * 4 * 16 * 8)}
    assert rows(result) == [("all_reduce", ("y",), (4, 16), 1)]


def test_tensor_parallel_layer_in_stablehlo_has_whole_sizes_and_a_note(mesh: Mesh) -> None:
    result = traced(mesh, feed_forward, *layer_arguments(mesh), source="stablehlo")
    assert result.flops == {"float32": 2 * (2 * 8 * 16 * 32)}
    assert any("2 x dot_general" in note and "all ranks together" in note for note in result.notes)
    assert any("dot_general over y" in note for note in result.notes)


@pytest.mark.parametrize("source", SOURCES)
def test_layer_on_an_abstract_mesh(source: str) -> None:
    """No devices are needed for what is written; a compiler needs them and says so in one line."""
    abstract = typed_mesh(AXES, "xy")
    with jax.sharding.use_abstract_mesh(abstract):
        if source == "hlo":
            with pytest.raises(CmxError, match=r"cannot be compiled for cpu: .*AbstractMesh"):
                trace(feed_forward, *layer_arguments(abstract), source=source)
            return
        result = trace(feed_forward, *layer_arguments(abstract), source=source)
    assert result.memory["arguments"] == 4 * (4 * 16 + 16 * 8 + 8 * 16)


@pytest.mark.parametrize("source", WRITTEN)
def test_reshard_is_named(mesh: Mesh, source: str) -> None:
    x = on(mesh, 8, 16, split=P("x", None))
    result = traced(mesh, lambda x: reshard(x, P(None, "x")), x, source=source)
    assert any("1 x reshard" in note and "source hlo" in note for note in result.notes)


def test_reshard_in_hlo(mesh: Mesh) -> None:
    x = on(mesh, 8, 16, split=P("x", None))
    (moved,) = traced(mesh, lambda x: reshard(x, P(None, "x")), x, source="hlo").collectives
    assert (moved["op"], moved["axes"], moved["wire_bytes"]) == ("all_to_all", ["x"], 4 * 16 * 4 / 2)


def test_reshard_to_a_part_of_a_rank_s_part_moves_nothing(mesh: Mesh) -> None:
    x = on(mesh, 8, 16, split=P(None, None))
    result = traced(mesh, lambda x: reshard(x, P("x", "y")), x, source="jaxpr")
    assert not any("reshard" in note for note in result.notes)
    assert rows(traced(mesh, lambda x: reshard(x, P("x", "y")), x, source="hlo")) == []


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("specs", [{"in_specs": P("x", "y")}, {}])
def test_shard_map_with_arguments_and_with_inferred_specs(mesh: Mesh, source: str, specs: Any) -> None:
    fn = jax.shard_map(lambda a: lax.psum(a, "y"), out_specs=P("x", None), **specs)
    result = traced(mesh, fn, on(mesh, 8, 16, split=P("x", "y")), source=source)
    assert rows(result) == [("all_reduce", ("y",), (4, 4), 1)]
    assert result.notes == []  # nothing is left to the compiler


@pytest.mark.parametrize("source", SOURCES)
def test_product_before_a_shard_map_is_one_rank_s(mesh: Mesh, source: str) -> None:
    def step(x: Any, w: Any) -> Any:
        total = jax.shard_map(lambda a: lax.psum(a, "y"), in_specs=P("x", "y"), out_specs=P("x", None))
        return total(x @ w)

    arguments = on(mesh, 8, 16, split=P("x", None)), on(mesh, 16, 32, split=P(None, "y"))
    result = traced(mesh, step, *arguments, source=source)
    assert rows(result) == [("all_reduce", ("y",), (4, 8), 1)]
    if source == "stablehlo":
        assert any("1 x dot_general" in note and "all ranks together" in note for note in result.notes)
    else:
        assert result.flops == {"float32": 2 * 4 * 16 * 8}


@pytest.mark.parametrize("source", WRITTEN)
def test_shard_map_over_one_axis_moves_one_rank_s_part(mesh: Mesh, source: str) -> None:
    fn = jax.shard_map(
        lambda a: lax.psum(a * 2, "y"), in_specs=P(None, "y"), out_specs=P(None, None), axis_names={"y"}
    )
    result = traced(mesh, fn, on(mesh, 8, 16, split=P("x", "y")), source=source)
    assert rows(result) == [("all_reduce", ("y",), (4, 4), 1)]


@pytest.mark.parametrize("source", SOURCES)
def test_scan_counts_its_products(mesh: Mesh, source: str) -> None:
    def step(x: Any, ws: Any) -> Any:
        def layer(h: Any, w: Any) -> Any:
            return jnp.einsum("bd,df->bf", h, w, out_sharding=P("x", None)), None

        return lax.scan(layer, x, ws)[0]

    arguments = on(mesh, 8, 16, split=P("x", None)), on(mesh, 3, 16, 16, split=P(None, "y", None))
    result = traced(mesh, step, *arguments, source=source)
    parts = 1 if source == "stablehlo" else 2 * 4
    assert result.flops == {"float32": 3 * 2 * 8 * 16 * 16 // parts}
    assert not any("that data decide" in note for note in result.notes)


@pytest.mark.parametrize("source", WRITTEN)
def test_product_that_the_compiler_splits_is_named(mesh: Mesh, source: str) -> None:
    fn = jax.sharding.auto_axes(lambda a: a @ a.T, out_sharding=P("x", None))
    result = traced(mesh, fn, on(mesh, 8, 16, split=P("x", "y")), source=source)
    assert any("splits 1 x dot_general" in note for note in result.notes)


@pytest.mark.parametrize("kind", ["devices", "abstract"])
def test_argument_that_is_not_placed_is_one_line(mesh: Mesh, kind: str) -> None:
    typed = mesh if kind == "devices" else typed_mesh(AXES, "xy")
    fn = jax.shard_map(lambda a: lax.psum(a, "y"), mesh=typed, in_specs=P("x", "y"), out_specs=P("x", None))
    with pytest.raises(
        CmxError, match=r"P\('x', 'y'\).*float32\[8,16\].*NamedSharding\(mesh, spec\)"
    ) as error:
        trace(fn, jax.ShapeDtypeStruct((8, 16), jnp.float32))
    assert "\n" not in str(error.value)


def test_assert_collectives_on_explicit_axes(mesh: Mesh) -> None:
    with jax.set_mesh(mesh):
        assert_collectives(feed_forward, layer_arguments(mesh), {("all_reduce", "y"): 1}, source="hlo")
