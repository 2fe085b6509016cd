"""A program's collectives and products as rows: for people, and for JSON."""

from collections.abc import Callable
from dataclasses import dataclass, field, fields
from typing import Any

from cmx_jax.mesh.supernode import CLOUDMATRIX384, Supernode
from cmx_jax.mesh.trace.differences import unit_of
from cmx_jax.mesh.trace.ops.collective import Collective
from cmx_jax.mesh.trace.ops.contents import Found, Product
from cmx_jax.mesh.trace.ops.place import groups_of, plane

Payload = Callable[[Collective], float | None]
"""Useful bytes of a collective on one rank, of all rounds that data decide on together; None: the operand."""
Flops = Callable[[Product], float | None]
"""Operations of a product, of all rounds that data decide on together; None: those of one."""


@dataclass(frozen=True)
class View:
    """What rows say beyond the program.

    Attributes:
      machine: whose nodes the ranks sit on, node by node.
      ranks_per_npu: 2 where a rank is a die.
      first_npu: on which the mesh begins.
      payload: what of an operand is useful, where that is less.
      useful: what of a product is useful.
    """

    machine: Supernode = CLOUDMATRIX384
    ranks_per_npu: int = 1
    first_npu: int = 0
    payload: Payload = lambda _: None
    useful: Flops = lambda _: None


@dataclass(frozen=True)
class Trace:
    """What one rank moves and computes in one run of a program.

    Attributes:
      source: `jaxpr`, `stablehlo` or `hlo`.
      collectives: a row for each place in the program, in its order: `op`, `axes`, `group_size`, `plane`,
        `dtype`, `shape`, `count`, `payload_bytes` and `wire_bytes` of all executions, `scope`. Where data
        decide how often a loop runs `count` is None, and it is counted once.
      flops: floating-point (or integer) operations of products by type; likewise.
      scopes: `flops` and `bytes` (operands and results) of products by scope and type; likewise.
      memory: bytes of a rank: `arguments`; of a compiled program also `temporaries`, `results` that are in no
        argument's place, and `peak`, the sum.
      seconds: what it took to `trace`, `lower` and `compile`.
      notes: what is uncertain, and where sources differ.
      found: what the rows are of.
    """

    source: str
    collectives: list[dict[str, Any]]
    flops: dict[str, int]
    scopes: dict[str, dict[str, dict[str, int]]]
    memory: dict[str, int]
    seconds: dict[str, float]
    notes: list[str]
    found: Found = field(repr=False, compare=False)

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {f.name: getattr(self, f.name) for f in fields(self) if f.name != "found"}


def rows_of(found: Found, view: View) -> list[dict[str, Any]]:
    """`Trace.collectives`."""

    def row(c: Collective) -> dict[str, Any]:
        part = view.payload(c)
        groups = c.groups or groups_of(c.axes, found.axes)
        return {
            "op": c.op,
            "axes": list(c.axes),
            "group_size": c.group_size,
            "plane": plane(groups, view.machine, view.ranks_per_npu, view.first_npu),
            "dtype": c.dtype,
            "shape": list(c.shape),
            "count": c.count,
            "payload_bytes": c.known * (c.operand_bytes if part is None else part),
            "wire_bytes": c.known * c.wire_bytes,
            "scope": c.scope,
        }

    return [row(c) for c in found.collectives]


def table(source: str, found: Found, view: View, memory: dict[str, int], seconds: dict[str, float]) -> Trace:
    """The rows of what a source holds."""
    notes = list(found.notes)
    if any(x.count is None for x in (*found.collectives, *found.products)):
        notes.append("count None: in a loop or branch that data decide; counted once")
    flops: dict[str, int] = {}
    scopes: dict[str, dict[str, dict[str, int]]] = {}
    for p in found.products:
        part = view.useful(p)
        done = int(p.known * (p.flops if part is None else part))
        flops[p.dtype] = flops.get(p.dtype, 0) + done
        of = scopes.setdefault(p.scope, {}).setdefault(p.dtype, {"flops": 0, "bytes": 0})
        of["flops"] += done
        of["bytes"] += p.known * p.bytes
    return Trace(source, rows_of(found, view), flops, scopes, memory, seconds, notes, found)


def render(t: Trace) -> str:
    """A table of the collectives, and the operations of products."""
    size, unit = unit_of(max((r["wire_bytes"] for r in t.collectives), default=0))
    titles = ("op", "axes", "plane", "operand", "count", f"payload {unit}", f"wire {unit}", "scope")
    rows: list[tuple[str, ...]] = [titles]
    for r in t.collectives:
        count = "data" if r["count"] is None else str(r["count"])
        sizes = (f"{r[of] / size:,.3f}" for of in ("payload_bytes", "wire_bytes"))
        axes, operand = ",".join(r["axes"]) or f"of {r['group_size']}", f"{r['dtype']}{r['shape']}"
        rows.append((r["op"], axes, r["plane"], operand, count, *sizes, r["scope"]))
    lines = aligned(rows, right={4, 5, 6})
    lines += [f"products: {scaled(flops)}FLOP in {dtype}" for dtype, flops in t.flops.items()]
    if t.memory:
        sizes = (f"{name} {scaled(size)}B" for name, size in t.memory.items())
        lines.append(f"memory of a rank: {', '.join(sizes)}")
    lines.append(", ".join(f"{name} {seconds:.1f} s" for name, seconds in t.seconds.items()))
    return "\n".join([*lines, *t.notes])


def scaled(number: float) -> str:
    """`7.04 T`, `1.2 k`: in front of a unit."""
    for prefix, size in (("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= size:
            return (
                f"{number / size:,.3g} {prefix}" if number < 1000 * size else f"{number / size:,.0f} {prefix}"
            )
    return f"{number:,.3g} "


def aligned(rows: list[tuple[str, ...]], right: set[int]) -> list[str]:
    """Lines of a table; `right`: columns of numbers."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(
            x.rjust(w) if i in right else x.ljust(w) for i, (x, w) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]
