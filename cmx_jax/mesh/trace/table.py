"""The collectives and products of a program as rows, for people and for JSON."""

from collections.abc import Callable
from dataclasses import dataclass, field, fields

from cmx_jax.mesh.supernode import CLOUDMATRIX384, Supernode
from cmx_jax.mesh.trace.differences import Row, unit_of
from cmx_jax.mesh.trace.ops.collective import Collective
from cmx_jax.mesh.trace.ops.contents import Contents, Product
from cmx_jax.mesh.trace.ops.place import groups_of, plane

Payload = Callable[[Collective], float | None]
"""Returns the useful bytes of a collective on a rank, data-dependent rounds together; None: the operand."""
Flops = Callable[[Product], float | None]
"""Returns the useful operations of a product, data-dependent rounds together; None: those of one."""


@dataclass(frozen=True)
class View:
    """The placement of the ranks, and the part of their work that is useful.

    Attributes:
      machine: Supernode whose nodes the ranks fill one after another.
      ranks_per_npu: Number of ranks per NPU: 2 where a rank is a die.
      first_npu: NPU of rank 0.
      payload: Function that returns the useful bytes of a collective where these are less than its operand.
      useful: Function that returns the useful operations of a product where these are less than all.

    Example:
      >>> View(ranks_per_npu=2).machine.name
      'CloudMatrix384'
    """

    machine: Supernode = CLOUDMATRIX384
    ranks_per_npu: int = 1
    first_npu: int = 0
    payload: Payload = lambda _: None
    useful: Flops = lambda _: None


@dataclass(frozen=True)
class Trace:
    """The traffic, operations and memory of one rank in one run of a program.

    Attributes:
      source: `jaxpr`, `stablehlo` or `hlo`.
      collectives: Rows in the order of the program: `op`, `axes`, `group_size`, `plane`, `dtype`, `shape`,
        `count`, `payload_bytes` and `wire_bytes` of all executions, `scope`. Where data decide how often a
        loop runs, `count` is None and the bytes are those of one iteration.
      flops: Floating-point (or integer) operations of products by type, counted in the same way.
      scopes: `flops` and `bytes` (operands and results) of products by scope and type.
      memory: Bytes of a rank: `arguments`; for a compiled program also `temporaries`, `results` that do not
        reuse an argument's memory, and `peak`, the sum.
      seconds: Seconds taken to `trace`, `lower` and `compile`.
      notes: Sentences on what is uncertain, and on the differences between sources.
      contents: The collectives and products themselves; not in JSON.

    Example:
      >>> import jax
      >>> from cmx_jax.mesh.trace import trace
      >>> trace(lambda x: x @ x, jax.ShapeDtypeStruct((4, 4), "float32")).flops
      {'float32': 128}
    """

    source: str
    collectives: list[Row]
    flops: dict[str, int]
    scopes: dict[str, dict[str, dict[str, int]]]
    memory: dict[str, int]
    seconds: dict[str, float]
    notes: list[str]
    contents: Contents = field(repr=False, compare=False)

    def as_dict(self) -> dict[str, object]:
        """Returns the trace as a dict for JSON, without `contents`."""
        return {f.name: getattr(self, f.name) for f in fields(self) if f.name != "contents"}


def rows_of(contents: Contents, view: View) -> list[Row]:
    """Returns the rows of `Trace.collectives`."""

    def row(c: Collective) -> Row:
        payload = view.payload(c)
        groups = c.groups or groups_of(c.axes, contents.axes)
        return {
            "op": c.op,
            "axes": list(c.axes),
            "group_size": c.group_size,
            "plane": plane(groups, view.machine, view.ranks_per_npu, view.first_npu),
            "dtype": c.dtype,
            "shape": list(c.shape),
            "count": c.count,
            "payload_bytes": c.known * (c.operand_bytes if payload is None else payload),
            "wire_bytes": c.known * c.wire_bytes,
            "scope": c.scope,
        }

    return [row(c) for c in contents.collectives]


def table(
    source: str, contents: Contents, view: View, memory: dict[str, int], seconds: dict[str, float]
) -> Trace:
    """Returns the trace of a program's contents; `memory` and `seconds` as in `Trace`."""
    notes = list(contents.notes)
    if any(x.count is None for x in contents.operations):
        where = "count `data`" if any(c.count is None for c in contents.collectives) else "some products"
        notes.append(f"{where}: in a loop or branch that data decide; counted once")
    flops: dict[str, int] = {}
    scopes: dict[str, dict[str, dict[str, int]]] = {}
    for p in contents.products:
        useful = view.useful(p)
        total = int(p.known * (p.flops if useful is None else useful))
        flops[p.dtype] = flops.get(p.dtype, 0) + total
        sums = scopes.setdefault(p.scope, {}).setdefault(p.dtype, {"flops": 0, "bytes": 0})
        sums["flops"] += total
        sums["bytes"] += p.known * p.bytes
    return Trace(source, rows_of(contents, view), flops, scopes, memory, seconds, notes, contents)


def render(t: Trace) -> str:
    """Returns a table of the collectives, with the operations of products and the notes below it.

    Example:
      >>> import jax
      >>> from cmx_jax.mesh.trace import trace
      >>> t = trace(lambda x: x @ x, jax.ShapeDtypeStruct((4, 4), "float32"))
      >>> print(render(t).splitlines()[1])
      products: 128 FLOP in float32
    """
    size, unit = unit_of(max((r["wire_bytes"] for r in t.collectives), default=0))
    titles = ("op", "axes", "plane", "operand", "count", f"payload {unit}", f"wire {unit}", "scope")
    rows: list[tuple[str, ...]] = [titles]
    for r in t.collectives:
        count = "data" if r["count"] is None else str(r["count"])
        sizes = (f"{r[key] / size:,.3f}" for key in ("payload_bytes", "wire_bytes"))
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
    """Formats a number with the prefix of its unit: `7.04 T`, `1.2 k`."""
    for prefix, size in (("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= size:
            return (
                f"{number / size:,.3g} {prefix}" if number < 1000 * size else f"{number / size:,.0f} {prefix}"
            )
    return f"{number:,.3g} "


def aligned(rows: list[tuple[str, ...]], right: set[int]) -> list[str]:
    """Returns the lines of a table; `right` are the columns to align on the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(
            x.rjust(w) if i in right else x.ljust(w) for i, (x, w) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]
