"""The result of `compare` as tables, layouts as columns: for the terminal, and for the page."""

import math
import textwrap
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

WIDTH = 100
UNITS = ("", "k", "M", "G", "T", "P")


@dataclass(frozen=True)
class Table:
    """A title with its unit, and a value of each layout in every row; None where a layout has none."""

    title: str
    rows: dict[str, list[float | str | None]]


def tables(d: dict[str, Any]) -> Iterator[Table]:
    """What is compared, in order; a further one is a line here."""
    yield _table(d, "layout", _shape)
    yield _summed(d, "useful bytes a rank sends, {}B", lambda x: moved(x, "payload_bytes"))
    yield _summed(d, "bytes that leave a rank, {}B", lambda x: moved(x, "wire_bytes"))
    yield _scaled(d, "operations of a rank's matmuls, {}", lambda x: x["flops"])
    yield _summed(d, "memory of a rank, {}B", lambda x: x["memory"])
    if d["source"] == "hlo":
        yield _scaled(d, f"memory of a rank as compiled for {d['target']}, {{}}B", lambda x: x["program"])
    yield _table(d, "seconds", lambda x: x["seconds"])
    if any(x["predicted_ms"] for x in d["layouts"]):
        title = f"predicted for its machine, weights in INT8 ({d['step']})"
        yield _table(d, title, lambda x: {"a step, ms": x["predicted_ms"]})
    if any(x["measured"] for x in d["layouts"]):
        yield _table(d, f"measured on this machine, all ranks together ({d['step']})", _measured)


Values = dict[str, float | str | None]
"""Of one layout, by row."""


def _table(d: dict[str, Any], title: str, of: Callable[[dict[str, Any]], Values]) -> Table:
    """A table with every row that any layout has."""
    each = [of(x) for x in d["layouts"]]
    labels = list(dict.fromkeys(label for values in each for label in values))
    return Table(title, {label: [values.get(label) for values in each] for label in labels})


def _scaled(d: dict[str, Any], title: str, of: Callable[[dict[str, Any]], dict[str, float]]) -> Table:
    """The same in a unit that suits the largest number."""
    power = unit(max((v for x in d["layouts"] for v in of(x).values()), default=0))
    scale = 1000.0**power
    return _table(d, title.format(UNITS[power]), lambda x: {label: v / scale for label, v in of(x).items()})


def _summed(d: dict[str, Any], title: str, of: Callable[[dict[str, Any]], dict[str, float]]) -> Table:
    """The same with sums below."""
    table = _scaled(d, title, of)
    if len(table.rows) > 1:
        table.rows["sum"] = [
            sum(v or 0.0 for v in column) for column in zip(*table.rows.values(), strict=True)
        ]
    return table


def unit(largest: float) -> int:
    """The power of 1,000 in which a number is at least 1."""
    return min(max(int(math.log(largest, 1000)), 0), len(UNITS) - 1) if largest > 0 else 0


def moved(x: dict[str, Any], of: str) -> dict[str, float]:
    """Bytes of one kind by place."""
    found: dict[str, float] = {}
    for row in x["moved"]:
        found[place(row)] = found.get(place(row), 0) + row[of]
    return found


def _shape(x: dict[str, Any]) -> Values:
    npus = -(-x["ranks"] // x["ranks_per_npu"])
    return {
        "ranks": x["ranks"],
        "ranks of an NPU": x["ranks_per_npu"],
        "NPUs": npus,
        "sequences": x["sequences"],
    }


def _measured(x: dict[str, Any]) -> Values:
    if not (seen := x["measured"]):
        return {}
    return {
        f"a step on {seen['runner']}, ms": seen["step_s"] * 1e3,
        "tokens as a single rank's": f"{seen['tokens_equal']} of {seen['tokens']}",
    }


def place(row: dict[str, Any]) -> str:
    """Where something is moved: `node,npu across nodes`."""
    planes = {"nodes": "across nodes", "node": "within node"}
    return f"{row['axes'] or 'other groups'} {planes.get(row['plane'], row['plane'])}"


def heading(d: dict[str, Any]) -> str:
    """What was asked, in a line."""
    drafts = f", {d['num_speculative_tokens']} drafts" if d["num_speculative_tokens"] else ""
    work = f"{d['batch']} sequences an NPU, {d['context']:,} tokens each{drafts}"
    return f"{d['model']}: a {d['step']} step, {work}; read from {d['source']}"


def notes(d: dict[str, Any]) -> list[str]:
    """Each note once, with the layouts that it is of, if not of all."""
    of: dict[str, list[str]] = {}
    for x in d["layouts"]:
        for note in x["notes"]:
            of.setdefault(note, []).append(x["name"])
    whole = len(d["layouts"])
    return [note if len(names) == whole else f"{', '.join(names)}: {note}" for note, names in of.items()]


def text(value: float | str | None) -> str:
    """A cell: numbers with four digits, `-` for nothing."""
    if value is None:
        return "-"
    if isinstance(value, str):
        return value
    if isinstance(value, int) or value == 0 or value >= 1000:
        return f"{value:,.0f}"
    digits = 3 if value < 10 else 2 if value < 100 else 1
    return f"{value:,.{digits}f}" if value >= 5e-4 else f"{value:.1e}"


def render(d: dict[str, Any]) -> str:
    """What `cmx compare` prints."""
    names = [x["name"] for x in d["layouts"]]
    found = list(tables(d))
    first = 2 + max(len(label) for table in found for label in table.rows)
    cells = [[text(v) for v in row] for table in found for row in table.rows.values()]
    wide = 2 + max(map(len, (*names, *(cell for row in cells for cell in row))))
    fit = max((WIDTH - first) // wide, 1)
    lines = [heading(d)]
    for start in range(0, len(names), fit):
        part = slice(start, start + fit)
        lines += ["", " " * first + "".join(name.rjust(wide) for name in names[part])]
        for table in found:
            lines.append(table.title)
            for label, row in table.rows.items():
                lines.append(f"  {label}".ljust(first) + "".join(text(v).rjust(wide) for v in row[part]))
    remarks = [*(f"{x['name']}: {x['about']}" for x in d["layouts"]), *notes(d)]
    return "\n".join([*lines, "", *(textwrap.fill(remark, WIDTH) for remark in remarks)])
