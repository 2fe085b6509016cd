"""Where two tables of collectives differ, in lines that people read."""

from collections.abc import Sequence
from typing import Any

Rows = Sequence[dict[str, Any]]
PLACE = ("op", "axes", "group_size", "plane", "dtype", "shape")
"""What makes two rows the same collective: not where it stands or what it is called."""


def differences(before: Rows, now: Rows, names: tuple[str, str], by: Sequence[str] = PLACE) -> list[str]:
    """A line for each kind of collective of which the tables have different executions, bytes or types.

    Args:
      before, now: rows as of `Trace.collectives`.
      names: what the tables are called.
      by: fields that tell kinds apart.
    """
    first, second = (_summed(rows, by) for rows in (before, now))
    found = []
    for key in dict.fromkeys((*first, *second)):
        was, is_ = first.get(key), second.get(key)
        if was == is_:
            continue
        what = _title(dict(zip(by, key, strict=True)))
        if was is None or is_ is None:
            found.append(f"{what}: only in {names[is_ is not None]}: {_said(was or is_)}")
        else:
            found.append(f"{what}: {names[0]} {_said(was)}, {names[1]} {_said(is_)}")
    return found


def _summed(rows: Rows, by: Sequence[str]) -> dict[tuple, dict[str, Any]]:
    """By kind: executions (None: data decide), wire and payload bytes, types."""
    found: dict[tuple, dict[str, Any]] = {}
    for row in rows:
        key = tuple(tuple(row[name]) if isinstance(row[name], list) else row[name] for name in by)
        of = found.setdefault(key, {"count": 0, "payload_bytes": 0, "wire_bytes": 0, "dtypes": set()})
        of["count"] = None if None in (of["count"], row["count"]) else of["count"] + row["count"]
        for size in ("payload_bytes", "wire_bytes"):
            of[size] += row[size]
        of["dtypes"].add(row["dtype"])
    return found


def _title(key: dict[str, Any]) -> str:
    over = ",".join(key["axes"]) or f"groups of {key.get('group_size', 'no axis')}"
    operand = f" of {key['dtype']}{list(key['shape'])}" if "shape" in key else ""
    return f"{key['op']} over {over}{operand}"


def _said(of: dict[str, Any] | None) -> str:
    assert of is not None
    count = "as often as data decide" if of["count"] is None else f"{of['count']} x"
    size, unit = unit_of(of["wire_bytes"])
    sizes = f"payload {of['payload_bytes'] / size:,.3f} {unit}, wire {of['wire_bytes'] / size:,.3f} {unit}"
    return f"{count} {'/'.join(sorted(of['dtypes']))} ({sizes})"


def unit_of(largest: float) -> tuple[float, str]:
    """The unit in which bytes are written, by the most of them: MB, or less where there are few."""
    return (1e6, "MB") if largest >= 1e6 else (1e3, "kB") if largest >= 1e3 else (1.0, "B")
