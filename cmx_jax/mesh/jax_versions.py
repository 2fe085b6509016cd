"""The one place that knows what differs between the JAX versions that `pyproject.toml` allows.

* New meshes: the axes of a new `jax.sharding.AbstractMesh` are `Auto` in older versions and `Explicit` in
  newer ones. On `Explicit` axes `jax.shard_map` refuses arguments that do not yet lie as its `in_specs` say.
  `auto_mesh` does not depend on the default, and `placement_advice` explains the refusal.
* Replica groups in StableHLO: older versions list the devices of each group, newer ones name the axes of a
  mesh where that is possible. `replica_groups` reads both.
"""

import math
from collections.abc import Collection, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.extend.mlir import ir
from jax.extend.mlir.dialects import sdy, stablehlo
from jax.sharding import AbstractMesh, AxisType, Mesh

from cmx_jax.mesh.groups import Axes, Groups, mesh_groups


def auto_mesh(axes: Axes, devices: Sequence[jax.Device] | None = None) -> Mesh | AbstractMesh:
    """Returns a mesh whose shardings the compiler chooses (`AxisType.Auto`), whatever JAX's default is.

    Args:
      axes: Name and size of each axis, outermost first.
      devices: Devices of the mesh, row by row; None for an `AbstractMesh`.
    """
    return typed_mesh(axes, (), devices)


def typed_mesh(
    axes: Axes, explicit: Collection[str], devices: Sequence[jax.Device] | None = None
) -> Mesh | AbstractMesh:
    """Returns a mesh as `auto_mesh`, with the axes named in `explicit` of `AxisType.Explicit`."""
    names, sizes = tuple(name for name, _ in axes), tuple(size for _, size in axes)
    types = tuple(AxisType.Explicit if name in explicit else AxisType.Auto for name in names)
    if devices is None:
        return AbstractMesh(sizes, names, axis_types=types)
    return Mesh(np.array(devices).reshape(sizes), names, axis_types=types)


def placement_advice(error: Exception) -> str:
    """Returns what to do about an error of `jax.shard_map` on a mesh with `Explicit` axes, or ''."""
    if "passed to shard_map" not in str(error) or "does not match the specs of the input" not in str(error):
        return ""
    return (
        "the mesh has Explicit axes: place the argument, as in jax.ShapeDtypeStruct(shape, dtype, "
        "sharding=NamedSharding(mesh, spec)) or jax.device_put, or make the mesh with "
        "axis_types=(jax.sharding.AxisType.Auto, ...)"
    )


class DeviceOrder(NamedTuple):
    """A mesh of a StableHLO module.

    Attributes:
      axes: Name and size of each axis, outermost first.
      devices: Device numbers, row by row; None for 0, 1, 2 and so on.
    """

    axes: Axes
    devices: np.ndarray | None = None


def module_meshes(module: ir.Module) -> dict[str, DeviceOrder]:
    """Returns the meshes that a StableHLO module declares, by their symbols."""
    meshes = {}
    for op in module.body.operations:
        if op.operation.name == "sdy.mesh":
            meshes[ir.StringAttr(op.attributes["sym_name"]).value] = _shardy_mesh(op.attributes["mesh"])
    return meshes


def replica_groups(
    attribute: Any, meshes: Mapping[str, DeviceOrder]
) -> tuple[Groups, tuple[str, ...] | None]:
    """Reads the replica groups of a StableHLO collective.

    Args:
      attribute: Attribute `replica_groups`.
      meshes: Meshes of the module, from `module_meshes`.

    Returns:
      Device numbers of each group (empty if the attribute is, which means one group of all devices), and the
      mesh axes that the groups run over where the attribute names whole axes, else None.
    """
    if not stablehlo.ReplicaGroupMeshAxesAttr.isinstance(attribute):
        rows = np.array(ir.DenseIntElementsAttr(attribute)).tolist()
        return tuple(tuple(n for n in row if n >= 0) for row in rows), None  # -1 fills short groups
    named = stablehlo.ReplicaGroupMeshAxesAttr(attribute)
    mesh = _named_mesh(named.mesh, meshes)
    sizes, parts = dict(mesh.axes), []
    for axis in map(stablehlo.AxisRefAttr, _items(named.axes)):
        part: Any = axis.sub_axis_info
        inner = None if part is None else stablehlo.SubAxisInfoAttr(part)
        parts.append((axis.name, inner.pre_size if inner else 1, inner.size if inner else sizes[axis.name]))
    whole_axes = all((before, size) == (1, sizes[name]) for name, before, size in parts)
    chosen = {name for name, _, _ in parts}
    return (
        mesh_groups(sizes, parts, mesh.devices),
        tuple(name for name in sizes if name in chosen) if whole_axes else None,
    )


def _named_mesh(attribute: Any, meshes: Mapping[str, DeviceOrder]) -> DeviceOrder:
    """Returns the mesh that an attribute refers to, or holds."""
    if sdy.MeshAttr.isinstance(attribute):
        return _shardy_mesh(attribute)
    if not stablehlo.MeshAttr.isinstance(attribute):
        return meshes[ir.FlatSymbolRefAttr(attribute).value]
    mesh = stablehlo.MeshAttr(attribute)
    axes = tuple((axis.name, axis.size) for axis in map(stablehlo.MeshAxisAttr, _items(mesh.axes)))
    ids: Any = mesh.device_ids
    return DeviceOrder(axes, None if ids is None else np.array(ir.DenseIntElementsAttr(ids)))


def _items(array: Any) -> list[Any]:
    return list(ir.ArrayAttr(array))


def _shardy_mesh(attribute: Any) -> DeviceOrder:
    mesh = sdy.MeshAttr(attribute)
    axes = tuple((axis.name, axis.size) for axis in map(sdy.MeshAxisAttr, mesh.axes))
    devices = list(mesh.device_ids)
    return DeviceOrder(axes, np.array(devices) if axes and devices else None)


def manual_axes(op: Any) -> list[str]:
    """Returns the axes of an `sdy.manual_computation`, along which sizes are those of one rank."""
    axes: Any = sdy.ManualAxesAttr(op.attributes["manual_axes"])
    return [str(name) for name in axes]


def manual_mesh(op: Any, meshes: Mapping[str, DeviceOrder]) -> DeviceOrder | None:
    """Returns the mesh of an `sdy.manual_computation`; None if it has neither arguments nor results."""
    for name in ("in_shardings", "out_shardings"):
        if shardings := list(sdy.TensorShardingPerValueAttr(op.attributes[name]).shardings):
            return _named_mesh(sdy.TensorShardingAttr(shardings[0]).mesh_or_ref, meshes)
    return None


def explicit_parts(value: Any, meshes: Mapping[str, DeviceOrder]) -> list[int] | None:
    """Returns how many parts the sharding constraint of a StableHLO value cuts each dimension into, if any.

    Args:
      value: Value that an `sdy.sharding_constraint` may have made.
      meshes: Meshes of the module, from `module_meshes`.
    """
    op = None if isinstance(value.owner, ir.Block) else value.owner
    if op is None or op.name != "sdy.sharding_constraint":
        return None
    sharding = sdy.TensorShardingAttr(op.attributes["sharding"])
    sizes = dict(_named_mesh(sharding.mesh_or_ref, meshes).axes)
    parts = []
    for dimension in map(sdy.DimensionShardingAttr, sharding.dimension_shardings):
        axes = map(sdy.AxisRefAttr, dimension.axes)
        parts.append(math.prod(_part_size(axis.sub_axis_info, sizes[axis.name]) for axis in axes))
    return parts


def _part_size(part: Any, axis_size: int) -> int:
    return axis_size if part is None else int(sdy.SubAxisInfoAttr(part).size)
