"""Collectives and products of a lowered program, from its StableHLO: as handed to the compiler, types as
written.

A program whose sharding the compiler decides (GSPMD) has no collectives yet.
"""

import math
import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache
from typing import Any

import jax.numpy as jnp
from jax.extend.mlir import ir
from jax.extend.mlir.dialects import stablehlo
from jax.interpreters.mlir import make_ir_context

from cmx_jax.errors import CmxError
from cmx_jax.mesh.groups import Axes, Groups
from cmx_jax.mesh.jax_versions import explicit_parts, manual_axes, module_meshes, replica_groups
from cmx_jax.mesh.trace.hlo.groups import axes_of_groups, axes_of_pairs, connected
from cmx_jax.mesh.trace.hlo.text import numpy_dtype
from cmx_jax.mesh.trace.ops.collective import Collective
from cmx_jax.mesh.trace.ops.contents import At, Found, Product, merge_branches
from cmx_jax.mesh.trace.ops.scope import joined, scopes
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


def read_stablehlo(program: Any) -> Found:
    """Collectives and products of a module, or of its text.

    Args:
      program: `lowered.compiler_ir("stablehlo")`, or `lowered.as_text()`; with `debug_info=True` it has
        scopes.

    Raises:
      CmxError: the text is no StableHLO.
    """
    if isinstance(program, str):
        with make_ir_context():
            try:
                return read_stablehlo(ir.Module.parse(program))
            except ir.MLIRError as error:
                reason = " ".join(str(error).split())[:120]
                raise CmxError(f"no StableHLO: expected lowered.as_text(); {reason}") from None
    return _Reader(program).found


class _Reader:
    def __init__(self, module: ir.Module):
        self.found = Found()
        self.meshes = module_meshes(module)
        self.functions = {
            ir.StringAttr(op.attributes["sym_name"]).value: op
            for op in module.body.operations
            if op.operation.name == "func.func"
        }
        for mesh in self.meshes.values():
            self.found.axes |= dict(mesh.axes)
        self.devices = max((math.prod(n for _, n in mesh.axes) for mesh in self.meshes.values()), default=1)
        if "main" not in self.functions:
            raise CmxError(f"no StableHLO program: expected a function main, found {list(self.functions)}")
        self._walk(self.functions["main"].regions[0], At(), self.found)

    def _walk(self, region: Any, at: At, found: Found) -> None:
        for block in region:
            for op in block:
                self._visit(op.operation, at, found)

    def _visit(self, op: Any, at: At, found: Found) -> None:
        named = _name(op)
        if op.name in OPS or (op.name == "stablehlo.custom_call" and _target(op) == RAGGED):
            scope = joined(at.scope, scopes(named))
            found.collectives += self._collectives(op, replace(at, scope=scope), found)
        elif op.name in PRODUCTS:
            found.products.append(_product(op, replace(at, scope=joined(at.scope, scopes(named))), found))
            if self._is_whole(at):
                found.whole[op.name.removeprefix("stablehlo.")] += 1
        elif op.name == "func.call":
            called = self.functions[ir.FlatSymbolRefAttr(op.attributes["callee"]).value]
            inside = replace(at, scope=joined(at.scope, scopes(f"{named}/call")))
            self._walk(called.regions[0], inside, found)
        elif op.name == "stablehlo.while":
            for region in op.regions:
                self._walk(region, at.times(trips(op)), found)
        elif op.name in ("stablehlo.case", "stablehlo.if"):
            each = []
            for region in op.regions:
                each.append(Found(axes=found.axes, order=found.order))
                self._walk(region, at, each[-1])
            merge_branches(each, found)
        elif op.name == "sdy.manual_computation":
            manual = (*at.manual, *manual_axes(op))
            self._walk(op.regions[0], replace(at, manual=manual), found)
        else:  # reductions have bodies without either
            for region in op.regions:
                self._walk(region, at, found)

    def _is_whole(self, at: At) -> bool:
        """Returns whether the compiler splits operations here over some axis."""
        return any(size > 1 and name not in at.manual for name, size in self.found.axes.items())

    def _collectives(self, op: Any, at: At, found: Found) -> Iterator[Collective]:
        """One for each operand: several may travel together."""
        name = OPS.get(op.name, RAGGED)
        share, pairs = 1.0, None
        if name == "permute":
            pairs, _ = replica_groups(op.attributes["source_target_pairs"], self.meshes)
            groups = connected(pairs)
            over = self._first_mesh_with(axes_of_pairs, pairs)
            size = math.prod(self.found.axes[axis] for axis in over)
            share = sum(a != b for a, b in pairs) / self.devices
        else:
            named = op.attributes if op.name in OPS else op.attributes["backend_config"]
            groups, axes = replica_groups(named["replica_groups"], self.meshes)
            groups = groups or (tuple(range(self.devices)),)
            over = self._first_mesh_with(axes_of_groups, groups) if axes is None else axes
            size = len(groups[0])
        operands = list(op.operands)[: 1 if name == RAGGED else None]
        for operand in operands:
            dtype, shape = _array(operand)
            if self._is_whole(at):
                parts = explicit_parts(operand, self.meshes)
                if parts is None:
                    found.whole[name] += 1
                else:
                    shape = tuple(n // part for n, part in zip(shape, parts, strict=True))
            yield Collective(
                name,
                over,
                size,
                dtype,
                shape,
                at.count,
                at.scope,
                share,
                groups,
                pairs,
                at.known,
                next(found.order),
            )

    def _first_mesh_with(self, axes_of: Callable[[Groups, Axes], tuple[str, ...]], groups: Groups) -> Any:
        """Returns the axes of the first mesh whose axes make these groups, or ()."""
        return next(filter(None, (axes_of(groups, mesh.axes) for mesh in self.meshes.values())), ())


def _name(op: Any) -> str:
    """What JAX calls it: `while/body/Dispatch/all_to_all`."""
    found = re.match(r'loc\("((?:[^"\\]|\\.)*)"(?!:\d)', str(op.location))
    return found.group(1) if found else ""


def _target(op: Any) -> str:
    return str(op.attributes["call_target_name"]).strip('"')


def _array(value: Any) -> tuple[str, tuple[int, ...]]:
    tensor = ir.RankedTensorType(value.type)
    return _dtype(str(tensor.element_type)), tuple(tensor.shape)


@cache
def _dtype(name: str) -> str:
    """MLIR's name of a type to NumPy's: `i32`, `ui8`, `i1`, `f8E4M3FN`, `complex<f32>`."""
    if name == "i1":
        return "bool"
    if name.startswith("complex"):
        return {"f32": "complex64", "f64": "complex128"}[name[8:-1]]
    kind, bits = re.match(r"(ui|i)?(.*)", name).groups()  # type: ignore[union-attr]
    return numpy_dtype({"ui": "u", "i": "s", None: ""}[kind] + bits.lower())


def _product(op: Any, at: At, found: Found) -> Product:
    (left, a), (right, b), (result, out) = map(_array, (*op.operands, op.results[0]))
    if op.name == "stablehlo.dot_general":
        numbers = stablehlo.DotDimensionNumbers(op.attributes["dot_dimension_numbers"])
        each = math.prod(a[i] for i in numbers.lhs_contracting_dimensions)
    else:
        kernel = stablehlo.ConvDimensionNumbers(op.attributes["dimension_numbers"])
        each = math.prod(b) // b[kernel.kernel_output_feature_dimension]
    arrays = ((left, a), (right, b), (result, out))
    moved = sum(math.prod(shape) * jnp.dtype(dtype).itemsize for dtype, shape in arrays)
    flops = 2 * math.prod(out) * each
    return Product(left, flops, moved, at.count, at.scope, at.known, next(found.order))
