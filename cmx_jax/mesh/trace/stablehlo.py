"""Reads collectives and products from StableHLO: the program as handed to the compiler, types as written.

A program whose sharding the compiler decides (GSPMD) has no collectives yet.
"""

import math
import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
from jax.extend.mlir import ir
from jax.extend.mlir.dialects import stablehlo
from jax.interpreters.mlir import make_ir_context

from cmx_jax.errors import CmxError
from cmx_jax.mesh.groups import Axes, Groups
from cmx_jax.mesh.jax_versions import (
    explicit_parts,
    manual_axes,
    manual_mesh,
    module_meshes,
    replica_groups,
)
from cmx_jax.mesh.trace.hlo.parser import numpy_dtype
from cmx_jax.mesh.trace.hlo.replica_groups import (
    axes_of_groups,
    axes_of_pairs,
    connected,
    largest,
    share_in_groups,
)
from cmx_jax.mesh.trace.ops.collective import Collective
from cmx_jax.mesh.trace.ops.contents import Contents, Context, Product, merge_branches, over
from cmx_jax.mesh.trace.ops.custom_calls import is_plain
from cmx_jax.mesh.trace.ops.scope import join_scopes, scopes
from cmx_jax.mesh.trace.ops.sizes import array_bytes
from cmx_jax.mesh.trace.stablehlo_loops import trips

OPS = {
    "stablehlo.all_to_all": "all_to_all",
    "stablehlo.all_gather": "all_gather",
    "stablehlo.all_reduce": "all_reduce",
    "stablehlo.reduce_scatter": "reduce_scatter",
    "stablehlo.collective_permute": "permute",
    "stablehlo.collective_broadcast": "broadcast",
}
PRODUCTS = frozenset(("stablehlo.dot_general", "stablehlo.convolution"))
RAGGED = "ragged_all_to_all"  # the target of a custom call


def read_stablehlo(program: Any) -> Contents:
    """Reads the collectives and products of a module, or of its text.

    Args:
      program: Result of `lowered.compiler_ir("stablehlo")`, or of `lowered.as_text()`, which has scopes only
        with `debug_info=True`.

    Raises:
      CmxError: The text is not StableHLO.
    """
    if isinstance(program, str):
        with make_ir_context():
            try:
                return read_stablehlo(ir.Module.parse(program))
            except ir.MLIRError as error:
                reason = " ".join(str(error).split())[:120]
                raise CmxError(f"no StableHLO: expected lowered.as_text(); {reason}") from None
    return _Reader(program).contents


class _Reader:
    def __init__(self, module: ir.Module):
        self.contents = Contents()
        self.meshes = module_meshes(module)
        self.functions = {
            ir.StringAttr(op.attributes["sym_name"]).value: op
            for op in module.body.operations
            if op.operation.name == "func.func"
        }
        for mesh in self.meshes.values():
            self.contents.axes |= dict(mesh.axes)
        self.devices = max((math.prod(n for _, n in mesh.axes) for mesh in self.meshes.values()), default=1)
        if "main" not in self.functions:
            raise CmxError(f"no StableHLO program: expected a function main, found {list(self.functions)}")
        context = Context(axes=tuple(self.contents.axes.items()))
        self._walk(self.functions["main"].regions[0], context, self.contents)
        self.contents.meshes = [mesh.axes for mesh in self.meshes.values()]
        self.contents.notes += [f"{count} x {name}" for name, count in self.contents.unknown.items()]

    def _walk(self, region: Any, context: Context, contents: Contents) -> None:
        for block in region:
            for op in block:
                self._visit(op.operation, context, contents)

    def _visit(self, op: Any, context: Context, contents: Contents) -> None:
        name = _name(op)
        is_call = op.name == "stablehlo.custom_call"
        if op.name in OPS or (is_call and _target(op) == RAGGED):
            scope = join_scopes(context.scope, scopes(name))
            contents.collectives += self._collectives(op, replace(context, scope=scope), contents)
        elif op.name in PRODUCTS:
            scope = join_scopes(context.scope, scopes(name))
            contents.products.append(_product(op, replace(context, scope=scope), contents))
            if unsplit := context.auto:
                contents.unsplit[over(op.name.removeprefix("stablehlo."), unsplit)] += 1
        elif op.name == "func.call":
            called = self.functions[_symbol(op.attributes["callee"])]
            inside = replace(context, scope=join_scopes(context.scope, scopes(f"{name}/call")))
            self._walk(called.regions[0], inside, contents)
        elif op.name == "stablehlo.while":
            for region in op.regions:
                self._walk(region, context.times(trips(op)), contents)
        elif op.name in ("stablehlo.case", "stablehlo.if"):
            branches = []
            for region in op.regions:
                branches.append(Contents(axes=contents.axes, order=contents.order))
                self._walk(region, context, branches[-1])
            merge_branches(branches, contents)
        elif op.name == "sdy.manual_computation":
            manual, mesh = (*context.manual, *manual_axes(op)), manual_mesh(op, self.meshes)
            axes = mesh.axes if mesh else context.axes
            self._walk(op.regions[0], replace(context, manual=manual, axes=axes), contents)
        else:  # the bodies of reductions have neither
            if "replica_groups" in op.attributes or op.name in ("stablehlo.send", "stablehlo.recv"):
                contents.unknown[f"{op.name}: unknown, what it moves is not counted"] += 1
            elif is_call and not is_plain(_target(op)):
                contents.unknown[f"custom call {_target(op)}: what it computes and sends is not counted"] += 1
            for region in op.regions:
                self._walk(region, context, contents)

    def _collectives(self, op: Any, context: Context, contents: Contents) -> Iterator[Collective]:
        """Yields one collective for each operand of an operation."""
        name = OPS.get(op.name, RAGGED)
        share, pairs = 1.0, None
        if name == "permute":
            pairs, _ = replica_groups(op.attributes["source_target_pairs"], self.meshes)
            groups = connected(pairs)
            axes = self._first_mesh_with(axes_of_pairs, pairs)
            size = math.prod(self.contents.axes[axis] for axis in axes) if axes else largest(groups)
            share = sum(a != b for a, b in pairs) / self.devices
        else:
            attributes = op.attributes if op.name in OPS else op.attributes["backend_config"]
            groups, axes = replica_groups(attributes["replica_groups"], self.meshes)
            groups = groups or (tuple(range(self.devices)),)
            axes = self._first_mesh_with(axes_of_groups, groups) if axes is None else axes
            size, share = largest(groups), share_in_groups(groups, self.devices)
        operands = list(op.operands)[: 1 if name == RAGGED else None]
        for operand in operands:
            dtype, shape = _array(operand)
            if unsplit := context.auto:
                parts = explicit_parts(operand, self.meshes)
                if parts is None:
                    contents.unsplit[over(name, unsplit)] += 1
                else:
                    shape = tuple(n // part for n, part in zip(shape, parts, strict=True))
            yield Collective(
                op=name,
                axes=axes,
                group_size=size,
                dtype=dtype,
                shape=shape,
                count=context.count,
                scope=context.scope,
                share=share,
                groups=groups,
                pairs=pairs,
                known=context.known,
                position=next(contents.order),
            )

    def _first_mesh_with(self, axes_of: Callable[[Groups, Axes], tuple[str, ...]], groups: Groups) -> Any:
        """Returns the axes of the first mesh whose axes make these groups, or ()."""
        axes = (axes_of(_positions(groups, mesh.devices), mesh.axes) for mesh in self.meshes.values())
        return next(filter(None, axes), ())


def _positions(groups: Groups, devices: np.ndarray | None) -> Groups:
    """Translates device numbers to positions in a mesh that has these devices, row by row."""
    if devices is None:
        return groups
    position = {int(device): rank for rank, device in enumerate(devices.ravel())}
    return tuple(tuple(position.get(device, device) for device in group) for group in groups)


def _symbol(attribute: Any) -> str:
    """Returns the name that a symbol refers to; MLIR quotes one such as `<lambda>`."""
    name = ir.FlatSymbolRefAttr(attribute).value
    return str(ir.Attribute.parse(name)).strip('"') if name.startswith('"') else name


def _name(op: Any) -> str:
    """Returns JAX's name of an operation, such as `while/body/Dispatch/all_to_all`; '' if it has none."""
    match = re.match(r'loc\("((?:[^"\\]|\\.)*)"(?!:\d)', str(op.location))
    return match.group(1) if match else ""


def _target(op: Any) -> str:
    return str(op.attributes["call_target_name"]).strip('"')


def _array(value: Any) -> tuple[str, tuple[int, ...]]:
    tensor = ir.RankedTensorType(value.type)
    return _dtype(str(tensor.element_type)), tuple(tensor.shape)


@cache
def _dtype(name: str) -> str:
    """Returns NumPy's name of a type that MLIR calls `i32`, `ui8`, `i1`, `f8E4M3FN` or `complex<f32>`."""
    if name == "i1":
        return "bool"
    if name.startswith("complex"):
        return {"f32": "complex64", "f64": "complex128"}[name[8:-1]]
    kind, bits = re.match(r"(ui|i)?(.*)", name).groups()  # type: ignore[union-attr]
    return numpy_dtype({"ui": "u", "i": "s", None: ""}[kind] + bits.lower())


def _product(op: Any, context: Context, contents: Contents) -> Product:
    (left, a), (right, b), (result, out) = map(_array, (*op.operands, op.results[0]))
    if op.name == "stablehlo.dot_general":
        numbers = stablehlo.DotDimensionNumbers(op.attributes["dot_dimension_numbers"])
        summed = math.prod(a[i] for i in numbers.lhs_contracting_dimensions)
    else:
        kernel = stablehlo.ConvDimensionNumbers(op.attributes["dimension_numbers"])
        summed = math.prod(b) // b[kernel.kernel_output_feature_dimension]
    arrays = ((left, a), (right, b), (result, out))
    moved = sum(array_bytes(shape, dtype) for dtype, shape in arrays)
    return Product(
        dtype=left,
        flops=2 * math.prod(out) * summed,
        bytes=moved,
        count=context.count,
        scope=context.scope,
        known=context.known,
        position=next(contents.order),
    )
