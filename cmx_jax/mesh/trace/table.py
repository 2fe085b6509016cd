"""A program's collectives and products as rows: for people, and for JSON."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import jax

from cmx_jax.mesh.supernode import CLOUDMATRIX384, Supernode
from cmx_jax.mesh.trace.collective import Collective
from cmx_jax.mesh.trace.jaxpr import Product, read_jaxpr
from cmx_jax.mesh.trace.place import groups_of, plane

Payload = Callable[[Collective], float | None]
"""Useful bytes of a collective on one rank, of all rounds that data decide on together; None: the operand."""
Flops = Callable[[Product], float | None]
"""Operations of a product, of all rounds that data decide on together; None: those of one."""


@dataclass(frozen=True)
class Trace:
    """What one rank moves and computes in one run of a program.

    Attributes:
      collectives: a row for each place in the program, in its order: `op`, `axes`, `group_size`, `plane`,
        `dtype`, `shape`, `count`, `payload_bytes` and `wire_bytes` of all executions, `scope`. Where data
        decide how often a loop runs `count` is None, and it is counted once.
      flops: floating-point (or integer) operations of products by type; likewise.
      scopes: those operations by scope.
      notes: what is uncertain.
    """

    collectives: list[dict[str, Any]]
    flops: dict[str, int]
    scopes: dict[str, int]
    notes: list[str] = field(default_factory=list)


def trace(
    fn: Any,
    *args: Any,
    machine: Supernode = CLOUDMATRIX384,
    ranks_per_npu: int = 1,
    first_npu: int = 0,
    payload: Payload = lambda _: None,
    useful: Flops = lambda _: None,
) -> Trace:
    """Traces a function of any arguments (arrays, or `jax.ShapeDtypeStruct`s); nothing is computed or
    compiled.

    Args:
      fn: jitted or not, with `shard_map` inside; or what `jax.jit(fn).trace(...)` returns.
      args: its arguments.
      machine: whose nodes the ranks sit on, node by node.
      ranks_per_npu: 2 where a rank is a die.
      first_npu: on which the mesh begins.
      payload: what of an operand is useful, where that is less.
      useful: what of a product is useful.
    """
    traced = fn if hasattr(fn, "jaxpr") else (fn if hasattr(fn, "trace") else jax.jit(fn)).trace(*args)
    found = read_jaxpr(traced.jaxpr)

    def row(c: Collective) -> dict[str, Any]:
        part = payload(c)
        where = plane(c.groups or groups_of(c.axes, found.axes), machine, ranks_per_npu, first_npu)
        return {
            "op": c.op,
            "axes": list(c.axes),
            "group_size": c.group_size,
            "plane": where,
            "dtype": c.dtype,
            "shape": list(c.shape),
            "count": c.count,
            "payload_bytes": c.known * (c.operand_bytes if part is None else part),
            "wire_bytes": c.known * c.wire_bytes,
            "scope": c.scope,
        }

    rows = [row(c) for c in found.collectives]
    notes = []
    if any(x.count is None for x in (*found.collectives, *found.products)):
        notes.append("count None: in a loop or branch that data decide; counted once")
    flops: dict[str, int] = {}
    scopes: dict[str, int] = {}
    for p in found.products:
        part = useful(p)
        done = int(p.known * (p.flops if part is None else part))
        flops[p.dtype] = flops.get(p.dtype, 0) + done
        scopes[p.scope] = scopes.get(p.scope, 0) + done
    return Trace(rows, flops, scopes, notes)


def render(t: Trace) -> str:
    """A table of the collectives, and the operations of products."""
    titles = ("op", "axes", "plane", "operand", "count", "payload MB", "wire MB", "scope")
    rows = [titles]
    for r in t.collectives:
        count = "data" if r["count"] is None else str(r["count"])
        sizes = (f"{r[of] / 1e6:,.3f}" for of in ("payload_bytes", "wire_bytes"))
        axes, operand = ",".join(r["axes"]), f"{r['dtype']}{r['shape']}"
        rows.append((r["op"], axes, r["plane"], operand, count, *sizes, r["scope"]))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    right = {4, 5, 6}
    lines = [
        "  ".join(
            x.rjust(w) if i in right else x.ljust(w) for i, (x, w) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    ]
    lines += [f"products: {flops / 1e12:,.3f} T operations in {dtype}" for dtype, flops in t.flops.items()]
    return "\n".join([*(line.rstrip() for line in lines), *t.notes])
