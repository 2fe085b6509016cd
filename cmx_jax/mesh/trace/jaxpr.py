"""Collectives and products of a program, from its jaxpr: what was written, before any compiler."""

import itertools
import math
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

from cmx_jax.mesh.trace.collective import Collective
from cmx_jax.mesh.trace.explicit import (
    explicit_axes,
    implied_collective,
    is_split_by_compiler,
    local_bytes,
    local_shape,
)
from cmx_jax.mesh.trace.place import groups_of
from cmx_jax.mesh.trace.scope import joined, scopes

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


@dataclass(frozen=True)
class Product:
    """A matmul or convolution as one rank sees it: type of its operands, operations and bytes once; `at` is
    its place in the order of the program, among collectives too; `shape` of a matmul `(batch, m, k, n)`."""

    dtype: str
    flops: int
    bytes: int
    count: int | None
    scope: str
    known: int
    at: int = field(default=0, compare=False)
    shape: tuple[int, ...] = ()


@dataclass
class Found:
    """What a program holds.

    Attributes:
      collectives: Collectives in the order of the program.
      products: Matrix products and convolutions in the order of the program.
      axes: Sizes of the mesh axes of its `shard_map`s and explicit shardings.
      notes: What is uncertain.
      arguments: Bytes that a rank gives to the program, or to its first `shard_map`; 0 if unknown.
      implied: Operations on explicitly sharded arrays for which the compiler inserts collectives, counted.
      whole: Operations that the compiler splits over some mesh axis, counted; their sizes here are those of
        all ranks along that axis together.
      order: Counter of places in the program.
    """

    collectives: list[Collective] = field(default_factory=list)
    products: list[Product] = field(default_factory=list)
    axes: dict[str, int] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    arguments: int = 0
    implied: Counter[str] = field(default_factory=Counter)
    whole: Counter[str] = field(default_factory=Counter)
    order: Iterator[int] = field(default_factory=itertools.count, repr=False)


@dataclass(frozen=True)
class At:
    """Where a reader is in a program.

    Attributes:
      count: Executions, or None where data decide.
      known: Executions by loops of known length alone.
      scope: `named_scope`s, outermost first, with `/` between.
      axes: Sizes of the axes of the mesh of the `shard_map` around.
      manual: Mesh axes along which sizes are those of one rank (StableHLO).
    """

    count: int | None = 1
    known: int = 1
    scope: str = ""
    axes: tuple[tuple[str, int], ...] = ()
    manual: tuple[str, ...] = ()

    def times(self, n: int | None) -> "At":
        """In a loop (None: data decide how often it runs)."""
        count = None if n is None or self.count is None else self.count * n
        return replace(self, count=count, known=self.known * (1 if n is None else n))


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


def merge_branches(each: list[Found], found: Found) -> None:
    """Adds what every branch of a condition holds; what all have alike is sure."""
    same = all(part.collectives == each[0].collectives for part in each)
    for i, part in enumerate(each):
        found.axes |= part.axes
        found.implied += part.implied
        found.whole += part.whole
        if same and i:
            continue
        collectives = part.collectives if same else [replace(c, count=None) for c in part.collectives]
        found.collectives += collectives
    alike = all(part.products == each[0].products for part in each)
    for part in each[:1] if alike else each:
        found.products += part.products if alike else [replace(p, count=None) for p in part.products]


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
