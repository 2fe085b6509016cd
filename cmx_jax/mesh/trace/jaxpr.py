"""Collectives and products of a program, from its jaxpr: what was written, before any compiler."""

import math
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

from cmx_jax.mesh.trace.collective import Collective

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


@dataclass(frozen=True)
class Product:
    """A matmul or convolution as one rank sees it: type of its operands, operations and bytes once."""

    dtype: str
    flops: int
    bytes: int
    count: int | None
    scope: str
    known: int


@dataclass
class Found:
    """What a jaxpr holds, in its order; `axes` are the mesh's of its `shard_map`s."""

    collectives: list[Collective] = field(default_factory=list)
    products: list[Product] = field(default_factory=list)
    axes: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class _At:
    """Where we are: executions (None: as the data want; by known loops alone), scopes, sizes of axes."""

    count: int | None = 1
    known: int = 1
    scope: str = ""
    axes: tuple[tuple[str, int], ...] = ()

    def times(self, n: int | None) -> "_At":
        count = None if n is None or self.count is None else self.count * n
        return replace(self, count=count, known=self.known * (1 if n is None else n))


def read_jaxpr(jaxpr: Any) -> Found:
    """Collectives and products of a (closed) jaxpr.

    Loops of known length are counted. What lies in a `while`, or in one branch of a condition and not in
    the same way in the others, has count None: data decide.
    """
    found = Found()
    _walk(getattr(jaxpr, "jaxpr", jaxpr), _At(), found)
    return found


def _walk(jaxpr: Any, at: _At, found: Found) -> None:
    for eqn in jaxpr.eqns:
        here = replace(at, scope=_joined(at.scope, str(eqn.source_info.name_stack)))
        name = eqn.primitive.name
        if name in OPS:
            found.collectives += _collectives(eqn, OPS[name], here)
        elif name in ("dot_general", "conv_general_dilated"):
            found.products.append(_product(eqn, here))
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
            _walk(eqn.params["jaxpr"], replace(here, axes=sizes), found)
        else:
            for inner in _inner(eqn.params.values()):
                _walk(inner, here, found)


def _joined(outer: str, inner: str) -> str:
    return "/".join(part for part in (outer, inner) if part)


def _inner(values: Any) -> Iterator[Any]:
    """Jaxprs among an equation's parameters."""
    for value in values:
        if isinstance(value, tuple | list):
            yield from _inner(value)
        elif hasattr(value, "eqns") or hasattr(value, "jaxpr"):
            yield getattr(value, "jaxpr", value)


def _branches(branches: Any, at: _At, found: Found) -> None:
    """Every branch; what all have alike is sure."""
    each = []
    for branch in branches:
        part = Found()
        _walk(branch.jaxpr, at, part)
        each.append(part)
    same = all(part.collectives == each[0].collectives for part in each)
    for i, part in enumerate(each):
        found.axes |= part.axes
        if same and i:
            continue
        collectives = part.collectives if same else [replace(c, count=None) for c in part.collectives]
        found.collectives += collectives
    alike = all(part.products == each[0].products for part in each)
    for part in each[:1] if alike else each:
        found.products += part.products if alike else [replace(p, count=None) for p in part.products]


def _collectives(eqn: Any, op: str, at: _At) -> Iterator[Collective]:
    """One for each operand: several may travel together."""
    given = eqn.params.get("axes", eqn.params.get("axis_name"))
    names = tuple(
        name for name in (given if isinstance(given, tuple | list) else (given,)) if isinstance(name, str)
    )
    sizes = dict(at.axes)
    if not names:  # an axis of a vmap: nothing moves
        return
    groups = eqn.params.get("axis_index_groups")
    size = len(groups[0]) if groups else math.prod(sizes[name] for name in names)
    share = 1.0
    if op == "permute":
        share = len({a for a, b in eqn.params["perm"] if a != b}) / size
    operands = eqn.invars[:1] if op == "ragged_all_to_all" else eqn.invars
    for operand in operands:
        dtype, shape = str(operand.aval.dtype), tuple(operand.aval.shape)
        yield Collective(op, names, size, dtype, shape, at.count, at.scope, share, known=at.known)


def _product(eqn: Any, at: _At) -> Product:
    a, b, out = (v.aval for v in (*eqn.invars[:2], eqn.outvars[0]))
    if eqn.primitive.name == "dot_general":
        (contracted, _), _ = eqn.params["dimension_numbers"]
        each = math.prod(a.shape[i] for i in contracted)
    else:
        kernel = eqn.params["dimension_numbers"].rhs_spec
        each = math.prod(b.shape[i] for i in kernel[1:])
    flops, moved = 2 * math.prod(out.shape) * each, sum(x.size * x.dtype.itemsize for x in (a, b, out))
    return Product(str(a.dtype), flops, moved, at.count, at.scope, at.known)
