"""The adapters to JAX versions: one test for each, with the forms of all versions."""

from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jax import lax
from jax.extend.mlir import ir
from jax.interpreters.mlir import make_ir_context
from jax.sharding import AbstractMesh, AxisType, Mesh
from jax.sharding import PartitionSpec as P

from cmx_jax.mesh.groups import Groups
from cmx_jax.mesh.jax_versions import (
    auto_mesh,
    explicit_parts,
    manual_axes,
    module_meshes,
    placement_advice,
    replica_groups,
    typed_mesh,
)
from cmx_jax.mesh.trace.stablehlo import read_stablehlo

AXES = (("a", 2), ("b", 4))
LISTED = "dense<[[0, 4], [1, 5], [2, 6], [3, 7]]> : tensor<4x2xi64>"
MESH = '#stablehlo.mesh<axes=[<name = "a", size = 2>, <name = "b", size = 4>]>'
REVERSED = f"{MESH[:-1]}, device_ids=dense<[7, 6, 5, 4, 3, 2, 1, 0]> : tensor<8xi64>>"


def over(mesh: str, *axes: str) -> str:
    """Replica groups as axes of a mesh: `b` or, for a part of an axis, `b", sub_axis_info = (1)2`."""
    refs = ", ".join(f'#stablehlo.axis_ref<name = "{axis}>' for axis in axes)
    return f"#stablehlo.replica_group_mesh_axes<mesh = {mesh}, axes = [{refs}]>"


def module(groups: str, size: int = 2) -> str:
    return f"""
module @m {{
  sdy.mesh @mesh = <["a"=2, "b"=4]>
  sdy.mesh @reversed = <["a"=2, "b"=4], device_ids=[7, 6, 5, 4, 3, 2, 1, 0]>
  func.func public @main(%x: tensor<8xf32>) -> tensor<{8 * size}xf32> {{
    %y = "stablehlo.all_gather"(%x) <{{all_gather_dim = 0 : i64, replica_groups = {groups},
      channel_handle = #stablehlo.channel_handle<handle = 1, type = 1>, use_global_device_ids}}>
      : (tensor<8xf32>) -> tensor<{8 * size}xf32>
    return %y : tensor<{8 * size}xf32>
  }}
}}"""


def read(text: str) -> tuple[Groups, tuple[str, ...] | None]:
    """Groups and axes of the only collective of a module."""
    with make_ir_context():
        parsed = ir.Module.parse(text)
        main = next(op for op in parsed.body.operations if op.operation.name == "func.func")
        gather = next(iter(main.regions[0].blocks[0].operations)).operation
        return replica_groups(gather.attributes["replica_groups"], module_meshes(parsed))


def test_auto_mesh_has_auto_axes() -> None:
    for mesh in (auto_mesh(AXES), auto_mesh(AXES, jax.devices()[:8])):
        assert dict(mesh.shape) == dict(AXES)
        assert mesh.axis_types == (AxisType.Auto, AxisType.Auto)
    assert isinstance(auto_mesh(AXES), AbstractMesh)
    assert isinstance(auto_mesh(AXES, jax.devices()[:8]), Mesh)


def test_typed_mesh_has_explicit_axes_where_named() -> None:
    assert typed_mesh(AXES, {"b"}).axis_types == (AxisType.Auto, AxisType.Explicit)


def test_placement_advice_for_an_unplaced_argument() -> None:
    step = jax.shard_map(
        lambda x: lax.psum(x, "a"), mesh=typed_mesh(AXES, "ab"), in_specs=P("a"), out_specs=P()
    )
    with pytest.raises(ValueError, match="in_specs") as error:
        jax.jit(step).trace(jax.ShapeDtypeStruct((8,), jnp.float32))
    assert "sharding=NamedSharding(mesh, spec)" in placement_advice(error.value)
    assert placement_advice(ValueError("of another kind")) == ""


COLUMNS = ((0, 4), (1, 5), (2, 6), (3, 7))


@pytest.mark.parametrize(
    ("groups", "size", "expected", "axes"),
    [
        (LISTED, 2, COLUMNS, None),
        (over("@mesh", 'a"'), 2, COLUMNS, ("a",)),
        (over(MESH, 'a"'), 2, COLUMNS, ("a",)),
        (over("@mesh", 'b"', 'a"'), 8, (tuple(range(8)),), ("a", "b")),
        (over("@mesh", 'b", sub_axis_info = (1)2'), 2, ((0, 2), (1, 3), (4, 6), (5, 7)), None),
        (over("@mesh", 'b", sub_axis_info = (2)2'), 2, ((0, 1), (2, 3), (4, 5), (6, 7)), None),
        (over("@reversed", 'b"'), 4, ((7, 6, 5, 4), (3, 2, 1, 0)), ("b",)),
        (over(REVERSED, 'b"'), 4, ((7, 6, 5, 4), (3, 2, 1, 0)), ("b",)),
    ],
)  # fmt: skip
def test_replica_groups(groups: str, size: int, expected: Any, axes: Any) -> None:
    result, named = read(module(groups, size))
    assert set(result) == set(expected)
    assert named == axes


@pytest.mark.parametrize("groups", [LISTED, over("@mesh", 'a"'), over(MESH, 'a"')])
def test_read_stablehlo_names_the_axes_of_any_form(groups: str) -> None:
    (gather,) = read_stablehlo(module(groups)).collectives
    assert (gather.op, gather.axes, gather.group_size, gather.wire_bytes) == ("all_gather", ("a",), 2, 32)


SHARDED = """
module @m {
  sdy.mesh @mesh = <["a"=2, "b"=4]>
  func.func public @main(%x: tensor<8x16xf32>) -> tensor<8x16xf32> {
    %y = sdy.sharding_constraint %x <@mesh, [{"a"}, {"b":(1)2}]> : tensor<8x16xf32>
    %z = sdy.manual_computation(%y) in_shardings=[<@mesh, [{}, {"b"}]>] out_shardings=[<@mesh, [{}, {"b"}]>]
      manual_axes={"b"} (%i: tensor<8x4xf32>) {
      sdy.return %i : tensor<8x4xf32>
    } : (tensor<8x16xf32>) -> tensor<8x16xf32>
    return %z : tensor<8x16xf32>
  }
}"""


def test_explicit_parts_and_manual_axes() -> None:
    with make_ir_context():
        parsed = ir.Module.parse(SHARDED)
        meshes = module_meshes(parsed)
        main = next(op for op in parsed.body.operations if op.operation.name == "func.func")
        block = main.regions[0].blocks[0]
        constraint, manual, _ = (op.operation for op in block.operations)
        assert explicit_parts(constraint.results[0], meshes) == [2, 2]
        assert explicit_parts(block.arguments[0], meshes) is None
        assert explicit_parts(manual.results[0], meshes) is None
        assert manual_axes(manual) == ["b"]
