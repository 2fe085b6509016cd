"""Reads collectives and products from a jaxpr: the program as written, before any compiler."""

import math
from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import Any

from cmx_jax.mesh.trace.explicit import (
    explicit_axes,
    implied_collective,
    is_split_by_compiler,
    local_bytes,
    local_shape,
)
from cmx_jax.mesh.trace.ops.collective import Collective
from cmx_jax.mesh.trace.ops.contents import Contents, Context, Product, merge_branches
from cmx_jax.mesh.trace.ops.place import groups_of
from cmx_jax.mesh.trace.ops.scope import join_scopes, scopes

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
    "pmax": "all_reduce",
    "pmin": "all_reduce",
    "ppermute": "permute",
    "ragged_all_to_all": "ragged_all_to_all",
}
PRODUCTS = ("dot_general", "ragged_dot_general", "conv_general_dilated")


def read_jaxpr(jaxpr: Any) -> Contents:
    """Reads the collectives and products of a (closed) jaxpr.

    Loops of known length are counted. An operation in a `while`, or in one branch of a condition and not in
    the same way in all of them, has count None: data decide.

    Example:
      >>> import jax
      >>> jaxpr = jax.make_jaxpr(lambda x: x @ x)(jax.ShapeDtypeStruct((4, 4), "float32"))
      >>> [product] = read_jaxpr(jaxpr).products
      >>> product.flops
      128
    """
    contents, program = Contents(), getattr(jaxpr, "jaxpr", jaxpr)
    _walk(program, Context(), contents)
    arguments = [v.aval for v in program.invars]
    if explicit := [aval for aval in arguments if explicit_axes(aval)]:
        contents.axes |= dict(explicit[0].sharding.mesh.shape)
        contents.arguments = sum(local_bytes(aval) for aval in arguments)
    if contents.implied or (explicit and not _only_maps(program)):
        named = ", ".join(f"{count} x {name}" for name, count in contents.implied.items())
        contents.notes.append(
            "shardings are explicit: the compiler inserts the collectives that they imply"
            f"{f' ({named})' if named else ''}, which source hlo shows"
        )
    return contents


def _walk(jaxpr: Any, context: Context, contents: Contents) -> None:
    for eqn in jaxpr.eqns:
        op_name = f"{eqn.source_info.name_stack}/{eqn.primitive}"
        inside = replace(context, scope=join_scopes(context.scope, scopes(op_name)))
        name = eqn.primitive.name
        if implied := implied_collective(eqn):
            contents.implied[implied] += 1
        if (name in OPS or name in PRODUCTS) and is_split_by_compiler(eqn):
            contents.unsplit[name] += 1
        if name in OPS:
            contents.collectives += _collectives(eqn, OPS[name], inside, contents)
        elif name in PRODUCTS:
            contents.products.append(_product(eqn, inside, contents))
        elif name == "scan":
            _walk(eqn.params["jaxpr"].jaxpr, inside.times(eqn.params["length"]), contents)
        elif name == "while":
            for part in ("cond_jaxpr", "body_jaxpr"):
                _walk(eqn.params[part].jaxpr, inside.times(None), contents)
        elif name == "cond":
            _branches(eqn.params["branches"], inside, contents)
        elif name == "shard_map":
            sizes = tuple(eqn.params["mesh"].shape.items())
            contents.axes |= dict(sizes)
            arguments = (v.aval for v in eqn.params["jaxpr"].invars)
            contents.arguments = contents.arguments or sum(map(local_bytes, arguments))
            _walk(eqn.params["jaxpr"], replace(inside, axes=sizes), contents)
        else:
            for inner in _inner(eqn.params.values()):
                _walk(inner, inside, contents)


def _only_maps(jaxpr: Any) -> bool:
    """Returns whether explicitly sharded arrays only go into `shard_map`s over all axes."""

    def is_map(eqn: Any) -> bool:
        inside = eqn.params["jaxpr"].invars if eqn.primitive.name == "shard_map" else eqn.invars
        return not any(explicit_axes(v.aval) for v in inside)

    return all(
        all(map(_only_maps, _inner(eqn.params.values())))
        if eqn.primitive.name in ("jit", "pjit")
        else is_map(eqn)
        for eqn in jaxpr.eqns
    )


def _inner(values: Any) -> Iterator[Any]:
    """Yields the jaxprs among an equation's parameters."""
    for value in values:
        if isinstance(value, tuple | list):
            yield from _inner(value)
        elif hasattr(value, "eqns") or hasattr(value, "jaxpr"):
            yield getattr(value, "jaxpr", value)


def _branches(branches: Any, context: Context, contents: Contents) -> None:
    parts = []
    for branch in branches:
        parts.append(Contents(order=contents.order))
        _walk(branch.jaxpr, context, parts[-1])
    merge_branches(parts, contents)


def _collectives(eqn: Any, op: str, context: Context, contents: Contents) -> Iterator[Collective]:
    """Yields one collective for each operand of an equation."""
    axes = eqn.params.get("axes", eqn.params.get("axis_name"))
    axes = axes if isinstance(axes, tuple | list) else (axes,)
    names = tuple(name for name in axes if isinstance(name, str))
    sizes = dict(context.axes)
    if not names:  # an axis of a vmap: nothing moves
        return
    parts = eqn.params.get("axis_index_groups")
    size = len(parts[0]) if parts else math.prod(sizes[name] for name in names)
    groups = _ranks(parts, names, sizes) if parts else None
    share, pairs = 1.0, None
    if op == "permute":
        share = len({a for a, b in eqn.params["perm"] if a != b}) / size
        pairs = _ranks(eqn.params["perm"], names, sizes)
    operands = eqn.invars[:1] if op == "ragged_all_to_all" else eqn.invars
    for operand in operands:
        yield Collective(
            op=op,
            axes=names,
            group_size=size,
            dtype=str(operand.aval.dtype),
            shape=local_shape(operand.aval),
            count=context.count,
            scope=context.scope,
            share=share,
            groups=groups,
            pairs=pairs,
            known=context.known,
            position=next(contents.order),
        )


def _ranks(
    parts: Iterable[Iterable[int]], names: tuple[str, ...], sizes: dict[str, int]
) -> tuple[tuple[int, ...], ...]:
    """Translates positions along some axes to ranks of the whole mesh."""
    return tuple(tuple(group[i] for i in part) for group in groups_of(names, sizes) for part in parts)


def _product(eqn: Any, context: Context, contents: Contents) -> Product:
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
