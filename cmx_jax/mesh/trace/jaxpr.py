"""Collectives and products of a program, from its jaxpr: what was written, before any compiler."""

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
from cmx_jax.mesh.trace.ops.contents import At, Found, Product, merge_branches
from cmx_jax.mesh.trace.ops.place import groups_of
from cmx_jax.mesh.trace.ops.scope import joined, scopes

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


def read_jaxpr(jaxpr: Any) -> Found:
    """Collectives and products of a (closed) jaxpr.

    Loops of known length are counted. What lies in a `while`, or in one branch of a condition and not in
    the same way in the others, has count None: data decide.
    """
    found, program = Found(), getattr(jaxpr, "jaxpr", jaxpr)
    _walk(program, At(), found)
    given = [v.aval for v in program.invars]
    if explicit := [aval for aval in given if explicit_axes(aval)]:
        found.axes |= dict(explicit[0].sharding.mesh.shape)
        found.arguments = sum(local_bytes(aval) for aval in given)
    if explicit or found.implied:
        named = ", ".join(f"{count} x {name}" for name, count in found.implied.items())
        found.notes.append(
            "shardings are explicit: the compiler inserts the collectives that they imply"
            f"{f' ({named})' if named else ''}, which source hlo shows"
        )
    return found


def _walk(jaxpr: Any, at: At, found: Found) -> None:
    for eqn in jaxpr.eqns:
        here = replace(at, scope=joined(at.scope, scopes(f"{eqn.source_info.name_stack}/{eqn.primitive}")))
        name = eqn.primitive.name
        if implied := implied_collective(eqn):
            found.implied[implied] += 1
        if (name in OPS or name in PRODUCTS) and is_split_by_compiler(eqn):
            found.whole[name] += 1
        if name in OPS:
            found.collectives += _collectives(eqn, OPS[name], here, found)
        elif name in PRODUCTS:
            found.products.append(_product(eqn, here, found))
        elif name == "scan":
            _walk(eqn.params["jaxpr"].jaxpr, here.times(eqn.params["length"]), found)
        elif name == "while":
            for part in ("cond_jaxpr", "body_jaxpr"):
                _walk(eqn.params[part].jaxpr, here.times(None), found)
        elif name == "cond":
            _branches(eqn.params["branches"], here, found)
        elif name == "shard_map":
            sizes = tuple(eqn.params["mesh"].shape.items())
            found.axes |= dict(sizes)
            given = (v.aval for v in eqn.params["jaxpr"].invars)
            found.arguments = found.arguments or sum(map(local_bytes, given))
            _walk(eqn.params["jaxpr"], replace(here, axes=sizes), found)
        else:
            for inner in _inner(eqn.params.values()):
                _walk(inner, here, found)


def _inner(values: Any) -> Iterator[Any]:
    """Jaxprs among an equation's parameters."""
    for value in values:
        if isinstance(value, tuple | list):
            yield from _inner(value)
        elif hasattr(value, "eqns") or hasattr(value, "jaxpr"):
            yield getattr(value, "jaxpr", value)


def _branches(branches: Any, at: At, found: Found) -> None:
    each = []
    for branch in branches:
        each.append(Found(order=found.order))
        _walk(branch.jaxpr, at, each[-1])
    merge_branches(each, found)


def _collectives(eqn: Any, op: str, at: At, found: Found) -> Iterator[Collective]:
    """One for each operand: several may travel together."""
    given = eqn.params.get("axes", eqn.params.get("axis_name"))
    names = tuple(
        name for name in (given if isinstance(given, tuple | list) else (given,)) if isinstance(name, str)
    )
    sizes = dict(at.axes)
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
        dtype, shape = str(operand.aval.dtype), local_shape(operand.aval)
        yield Collective(
            op,
            names,
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


def _ranks(
    parts: Iterable[Iterable[int]], names: tuple[str, ...], sizes: dict[str, int]
) -> tuple[tuple[int, ...], ...]:
    """Places along some axes as ranks of the whole mesh."""
    return tuple(tuple(group[i] for i in part) for group in groups_of(names, sizes) for part in parts)


def _product(eqn: Any, at: At, found: Found) -> Product:
    avals = [v.aval for v in (*eqn.invars[:2], eqn.outvars[0])]
    a, b, out = map(local_shape, avals)
    shape: tuple[int, ...] = ()
    if eqn.primitive.name == "ragged_dot_general":  # each row meets one group's matrix
        numbers = eqn.params["ragged_dot_dimension_numbers"].dot_dimension_numbers
        flops = 2 * math.prod(out) * math.prod(a[i] for i in numbers[0][0])
    elif eqn.primitive.name == "dot_general":
        (contracted, _), (batched, _) = eqn.params["dimension_numbers"]
        each, batch = (math.prod(a[i] for i in dims) for dims in (contracted, batched))
        shape = (batch, _quotient(a, batch * each), each, _quotient(b, batch * each))
        flops = 2 * math.prod(shape)
    else:
        kernel = eqn.params["dimension_numbers"].rhs_spec
        flops = 2 * math.prod(out) * math.prod(b[i] for i in kernel[1:])
    moved = sum(map(local_bytes, avals))
    dtype = str(avals[0].dtype)
    return Product(dtype, flops, moved, at.count, at.scope, at.known, next(found.order), shape)


def _quotient(shape: tuple[int, ...], size: int) -> int:
    return math.prod(shape) // max(size, 1)
