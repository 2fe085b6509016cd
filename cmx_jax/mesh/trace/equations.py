"""Reads one equation of a jaxpr as collectives or as a product, each as one rank sees it."""

import math
from collections.abc import Iterable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

from cmx_jax.mesh.groups import Axes, Groups
from cmx_jax.mesh.trace.explicit import local_bytes, local_shape, stored_array
from cmx_jax.mesh.trace.ops.collective import Collective
from cmx_jax.mesh.trace.ops.contents import Contents, Context, Product
from cmx_jax.mesh.trace.ops.place import groups_of
from cmx_jax.mesh.trace.pallas import remote_copy

OPS = {  # primitive -> operation
    "all_to_all": "all_to_all",
    "all_gather": "all_gather",
    "all_gather_invariant": "all_gather",
    "all_gather_reduced": "all_gather",
    "reduce_scatter": "reduce_scatter",
    "unreduced_reduce_scatter": "reduce_scatter",
    "psum": "all_reduce",
    "psum_invariant": "all_reduce",
    "unreduced_psum": "all_reduce",
    "unreduced_pmax": "all_reduce",
    "unreduced_pmin": "all_reduce",
    "pmax": "all_reduce",
    "pmin": "all_reduce",
    "ppermute": "permute",
    "psend": "permute",
    "pbroadcast": "broadcast",
    "pbroadcast_dynamic": "broadcast",
    "ragged_all_to_all": "ragged_all_to_all",
}
DONE = frozenset(f"{name}_done" for name in OPS)
OPS |= {f"{name}_start": op for name, op in OPS.items()}
STAYING = frozenset(  # these name mesh axes and move nothing (what `precv` receives, `psend` has sent)
    [
        "axis_index",
        "pcast",
        "precv",
        "preduced",
        "pvary",
        "reduced_vary_cast",
        "reduced_vary_cast_p",
        "vary_unreduced_cast",
        "vary_unreduced_cast_p",
    ]
)
AXIS_PARAMS = ("axes", "axis", "axis_name", "axis_names")
PRODUCTS = ("dot_general", "ragged_dot_general", "conv_general_dilated")


def collectives_of(eqn: Any, op: str, context: Context, contents: Contents) -> Iterator[Collective]:
    """Yields one collective for each operand of an equation."""
    axes = eqn.params.get("axes", eqn.params.get("axis_name"))
    axes = axes if isinstance(axes, tuple | list) else (axes,)
    names = tuple(name for name in axes if isinstance(name, str))
    sizes = dict(context.axes)
    if not names:  # an axis of a vmap: nothing moves
        return
    parts = eqn.params.get("axis_index_groups")
    size = len(parts[0]) if parts else math.prod(sizes[name] for name in names)
    groups: Groups | None = _ranks(parts or (range(size),), names, context)
    share, pairs = 1.0, None
    if op == "permute":
        share = len({a for a, b in eqn.params["perm"] if a != b}) / size
        groups, pairs = None, _ranks(eqn.params["perm"], names, context)
    operands = eqn.invars[:1] if op == "ragged_all_to_all" else eqn.invars
    for operand in operands:
        dtype, shape = stored_array(operand.aval)
        yield Collective(
            op=op,
            axes=names,
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


def _ranks(parts: Iterable[Iterable[int]], names: tuple[str, ...], context: Context) -> Groups:
    """Translates positions along some axes to ranks of the whole mesh.

    JAX refuses a program whose meshes have the same devices in different orders, so ranks are those of all.
    """
    return _translated(tuple(map(tuple, parts)), names, context.axes)


@cache
def _translated(parts: Groups, names: tuple[str, ...], axes: Axes) -> Groups:
    return tuple(tuple(group[i] for i in part) for group in groups_of(names, dict(axes)) for part in parts)


def product_of(eqn: Any, context: Context, contents: Contents) -> Product:
    """Returns the product of an equation with one of the primitives `PRODUCTS`."""
    avals = [v.aval for v in (*eqn.invars[:2], eqn.outvars[0])]
    a, b, out = map(local_shape, avals)
    shape: tuple[int, ...] = ()
    if eqn.primitive.name == "ragged_dot_general":  # each row meets one group's matrix
        numbers = eqn.params["ragged_dot_dimension_numbers"].dot_dimension_numbers
        flops = 2 * math.prod(out) * math.prod(a[i] for i in numbers[0][0])
    elif eqn.primitive.name == "dot_general":
        (contracted, _), (batched, _) = eqn.params["dimension_numbers"]
        summed, batch = (math.prod(a[i] for i in dims) for dims in (contracted, batched))
        shape = (batch, _quotient(a, batch * summed), summed, _quotient(b, batch * summed))
        flops = 2 * math.prod(shape)
    else:
        kernel = eqn.params["dimension_numbers"].rhs_spec
        flops = 2 * math.prod(out) * math.prod(b[i] for i in kernel[1:])
    return Product(
        dtype=str(avals[0].dtype),
        flops=flops,
        bytes=sum(map(local_bytes, avals)),
        count=context.count,
        scope=context.scope,
        known=context.known,
        position=next(contents.order),
        shape=shape,
    )


def _quotient(shape: tuple[int, ...], size: int) -> int:
    return math.prod(shape) // max(size, 1)


def remote_copies_of(eqn: Any, context: Context, contents: Contents) -> Iterator[Collective]:
    """Yields the copy of a Pallas kernel to another device, if it is one: to any device of the mesh."""
    if (copied := remote_copy(eqn)) is None:
        return
    dtype, shape = copied
    yield Collective(
        op="remote_copy",
        axes=tuple(name for name, _ in context.axes),
        group_size=math.prod(size for _, size in context.axes),
        dtype=dtype,
        shape=shape,
        count=context.count,
        scope=context.scope,
        known=context.known,
        position=next(contents.order),
    )


def named_axes(eqn: Any, context: Context) -> list[str]:
    """Returns the mesh axes that the parameters of an equation name."""
    sizes, named = dict(context.axes), []
    for value in (eqn.params[key] for key in AXIS_PARAMS if key in eqn.params):
        values = value if isinstance(value, tuple | list | set | frozenset) else (value,)
        named += [name for name in values if isinstance(name, str) and name in sizes]
    return named


def place_of(eqn: Any) -> str:
    """Returns the line of the user's code that an equation comes from, such as `model.py:12`."""
    frames = eqn.source_info.traceback.frames if eqn.source_info.traceback else ()
    for frame in frames:
        if not {"jax", "flax", "jaxlib"} & set(Path(frame.file_name).parts):
            return f"{Path(frame.file_name).name}:{frame.line_num}"
    return "unknown line"
