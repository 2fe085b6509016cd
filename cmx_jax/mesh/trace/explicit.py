"""Explicit shardings in a jaxpr: how the type of an array describes the part that one rank has."""

import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AxisType

from cmx_jax.mesh.specs import entry_axes
from cmx_jax.mesh.trace.ops.sizes import array_bytes


def explicit_axes(aval: Any) -> dict[str, int]:
    """Returns the sizes of the explicit mesh axes (of more than one rank) in the type of an array."""
    mesh = _mesh(aval)
    if mesh is None:
        return {}
    sizes = zip(mesh.axis_names, mesh.axis_sizes, mesh.axis_types, strict=True)
    return {name: size for name, size, kind in sizes if kind == AxisType.Explicit and size > 1}


def local_shape(aval: Any) -> tuple[int, ...]:
    """Returns the shape of one rank's part of an array, as far as its type shows how it is split."""
    sizes = explicit_axes(aval)
    return tuple(
        size // math.prod(sizes[axis] for axis in axes)
        for size, axes in zip(aval.shape, _split(aval), strict=True)
    )


def _split(aval: Any) -> list[tuple[str, ...]]:
    """Returns the explicit mesh axes that each dimension is split over."""
    known = explicit_axes(aval)
    spec = tuple(aval.sharding.spec) if known else ()
    named = [entry_axes(entry) for entry in spec]
    named += [()] * (len(aval.shape) - len(named))
    return [tuple(axis for axis in axes if axis in known) for axes in named]


def local_bytes(aval: Any) -> int:
    """Returns the bytes of one rank's part of an array."""
    dtype, shape = stored_array(aval)
    return array_bytes(shape, dtype)


def stored_array(aval: Any) -> tuple[str, tuple[int, ...]]:
    """Returns the type and shape of one rank's part of an array; a typed PRNG key is stored as integers."""
    shape = local_shape(aval)
    if not jnp.issubdtype(aval.dtype, jax.dtypes.prng_key):
        return str(aval.dtype), shape
    data = jax.eval_shape(jax.random.key_data, jax.ShapeDtypeStruct(shape, aval.dtype))
    return str(data.dtype), data.shape


def implied_collective(eqn: Any) -> str:
    """Returns the name of an operation whose explicit shardings imply a collective, else ''."""
    name = eqn.primitive.name
    if name == "reshard":
        before, result = eqn.invars[0].aval, eqn.outvars[0].aval
        if not explicit_axes(result):
            return ""  # the compiler decides from here on
        pairs = zip(_split(before), _split(result), strict=True)
        return "" if all(b == a[: len(b)] for b, a in pairs) else name  # a rank holds its new part already
    if name == "dot_general":
        (summed_dims, _), _ = eqn.params["dimension_numbers"]
    elif name.startswith(("reduce_", "arg")):
        summed_dims = eqn.params.get("axes", ())
    else:
        return ""
    split = _split(eqn.invars[0].aval)
    summed = [axis for dim in summed_dims for axis in split[dim]]
    return f"{name} over {', '.join(summed)}" if summed else ""


def is_split_by_compiler(eqn: Any) -> bool:
    """Returns whether the compiler splits an operation over mesh axes that its types do not mention."""
    meshes = [_mesh(v.aval) for v in eqn.invars]
    known = [mesh for mesh in meshes if mesh is not None]
    return not known or any(
        kind == AxisType.Auto and size > 1
        for mesh in known
        for kind, size in zip(mesh.axis_types, mesh.axis_sizes, strict=True)
    )


def _mesh(aval: Any) -> Any:
    """Returns the mesh in the type of an array; None if there is none."""
    mesh = getattr(getattr(aval, "sharding", None), "mesh", None)
    return None if mesh is None or mesh.empty else mesh
