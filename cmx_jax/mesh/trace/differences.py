"""The differences between two tables of collectives, as lines for people."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

Row = dict[str, Any]
"""A row of `Trace.collectives`."""
Rows = Sequence[Row]
PLACE = ("op", "axes", "group_size", "plane", "dtype", "shape")
"""Keys by which two rows are the same collective: neither its position nor its scope."""


@dataclass
class _Sums:
    """The rows of one kind together: executions (None: data decide), bytes and types."""

    count: int | None = 0
    payload_bytes: float = 0
    wire_bytes: float = 0
    dtypes: set[str] = field(default_factory=set)

    def __str__(self) -> str:
        count = "as often as data decide" if self.count is None else f"{self.count} x"
        size, unit = unit_of(self.wire_bytes)
        payload, wire = self.payload_bytes / size, self.wire_bytes / size
        sizes = f"payload {payload:,.3f} {unit}, wire {wire:,.3f} {unit}"
        return f"{count} {'/'.join(sorted(self.dtypes))} ({sizes})"


def differences(before: Rows, now: Rows, names: tuple[str, str], by: Sequence[str] = PLACE) -> list[str]:
    """Returns a line for each kind of collective whose executions, bytes or types differ.

    Args:
      before, now: Rows of two tables, as in `Trace.collectives`.
      names: Names of the two tables.
      by: Keys of a row that make up its kind.

    Example:
      >>> differences([], [], ("before", "now"))
      []
    """
    first, second = (_summed(rows, by) for rows in (before, now))
    lines = []
    for key in dict.fromkeys((*first, *second)):
        old, new = first.get(key), second.get(key)
        if old == new:
            continue
        title = _title(dict(zip(by, key, strict=True)))
        if old is None or new is None:
            lines.append(f"{title}: only in {names[new is not None]}: {old or new}")
        else:
            lines.append(f"{title}: {names[0]} {old}, {names[1]} {new}")
    return lines


def _summed(rows: Rows, by: Sequence[str]) -> dict[tuple, _Sums]:
    """Sums the rows of each kind."""
    sums: dict[tuple, _Sums] = {}
    for row in rows:
        key = tuple(tuple(row[name]) if isinstance(row[name], list) else row[name] for name in by)
        total = sums.setdefault(key, _Sums())
        decided = total.count is not None and row["count"] is not None
        total.count = total.count + row["count"] if decided else None
        total.payload_bytes += row["payload_bytes"]
        total.wire_bytes += row["wire_bytes"]
        total.dtypes.add(row["dtype"])
    return sums


def _title(kind: Row) -> str:
    axes = ",".join(kind["axes"]) or f"groups of {kind.get('group_size', 'no axis')}"
    operand = f" of {kind['dtype']}{list(kind['shape'])}" if "shape" in kind else ""
    return f"{kind['op']} over {axes}{operand}"


def unit_of(largest: float) -> tuple[float, str]:
    """Returns the size and name of the unit for a number of bytes: MB, or kB or B for few."""
    return (1e6, "MB") if largest >= 1e6 else (1e3, "kB") if largest >= 1e3 else (1.0, "B")
