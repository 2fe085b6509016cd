"""A comparison as tables with a column for each layout, for the terminal and for the page."""

import math
import textwrap
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from cmx_jax.analysis.compare.comparison import Comparison, LayoutRow

WIDTH = 100
UNITS = ("", "k", "M", "G", "T", "P")

Numbers = Callable[[LayoutRow], dict[str, float]]
"""Numbers of one layout, by row label."""
Values = dict[str, float | str | None]
"""Cells of one layout, by row label."""


@dataclass(frozen=True)
class Table:
    """One table of a comparison.

    Attributes:
      title: Title, with the unit.
      rows: Cells by row label, one for each layout; None where a layout has no value.
      figure: Name of the plot of the same numbers in `cmx_jax.analysis.compare.plots.plots`; '' for none.
    """

    title: str
    rows: dict[str, list[float | str | None]]
    figure: str = ""


def tables(comparison: Comparison) -> Iterator[Table]:
    """Yields the tables in order; a new table is a line here."""
    c = comparison
    yield _table(c, "layout", _shape)
    yield _with_sums(_scaled(c, "useful bytes a rank sends, {}B", LayoutRow.payload_by_place, "useful"))
    yield _with_sums(_scaled(c, "bytes that leave a rank, {}B", LayoutRow.wire_by_place, "sent"))
    yield _scaled(c, "operations of a rank's matmuls, {}", lambda row: {**row.flops})
    yield _with_sums(_scaled(c, "memory of a rank, {}B", lambda row: {**row.memory}, "memory"))
    if c.source == "hlo":
        yield _scaled(c, f"memory of a rank as compiled for {c.target}, {{}}B", lambda row: {**row.program})
    yield _table(c, "seconds", lambda row: {**row.seconds})
    if any(row.predicted_ms for row in c.layouts):
        title = f"predicted for its machine, weights in INT8 ({c.step})"
        yield _table(c, title, lambda row: {"a step, ms": row.predicted_ms})
    if any(row.measured for row in c.layouts):
        yield _table(c, f"measured on this machine, all ranks together ({c.step})", _measured)


def _table(
    comparison: Comparison, title: str, values_of: Callable[[LayoutRow], Values], figure: str = ""
) -> Table:
    """Returns a table with every row that any layout has."""
    columns = [values_of(row) for row in comparison.layouts]
    labels = list(dict.fromkeys(label for values in columns for label in values))
    return Table(title, {label: [values.get(label) for values in columns] for label in labels}, figure)


def _scaled(comparison: Comparison, title: str, numbers_of: Numbers, figure: str = "") -> Table:
    """Returns a table in a unit that suits the largest number; `title` has `{}` where its prefix goes."""
    power = unit(max((v for row in comparison.layouts for v in numbers_of(row).values()), default=0))

    def scaled(row: LayoutRow) -> Values:
        return {label: number / 1000.0**power for label, number in numbers_of(row).items()}

    return _table(comparison, title.format(UNITS[power]), scaled, figure)


def _with_sums(table: Table) -> Table:
    """Returns the table of numbers with their sums below, if it has more than one row."""
    if len(table.rows) < 2:
        return table
    sums = [sum(v or 0.0 for v in column) for column in zip(*table.rows.values(), strict=True)]
    return replace(table, rows={**table.rows, "sum": sums})


def unit(largest: float) -> int:
    """Returns the power of 1,000 in which a number is at least 1."""
    return min(max(int(math.log(largest, 1000)), 0), len(UNITS) - 1) if largest > 0 else 0


def _shape(row: LayoutRow) -> Values:
    return {
        "ranks": row.ranks,
        "ranks of an NPU": row.ranks_per_npu,
        "NPUs": -(-row.ranks // row.ranks_per_npu),
        "sequences": row.sequences,
    }


def _measured(row: LayoutRow) -> Values:
    if row.measured is None:
        return {}
    return {
        f"a step on {row.measured.runner}, ms": row.measured.step_s * 1e3,
        "tokens as a single rank's": f"{row.measured.tokens_equal} of {row.measured.tokens}",
    }


def heading(comparison: Comparison) -> str:
    """Describes the step that is compared, in one line."""
    c = comparison
    drafts = f", {c.num_speculative_tokens} drafts" if c.num_speculative_tokens else ""
    work = f"{c.batch} sequences an NPU, {c.context:,} tokens each{drafts}"
    return f"{c.model}: a {c.step} step, {work}; read from {c.source}"


def notes(comparison: Comparison) -> list[str]:
    """Returns each note once, after the names of its layouts if not all of them have it."""
    names_of: dict[str, list[str]] = {}
    for row in comparison.layouts:
        for note in row.notes:
            names_of.setdefault(note, []).append(row.name)
    everywhere = len(comparison.layouts)
    return [
        note if len(names) == everywhere else f"{', '.join(names)}: {note}"
        for note, names in names_of.items()
    ]


def text(value: float | str | None) -> str:
    """Formats a cell: numbers with four digits, `-` for None."""
    if value is None:
        return "-"
    if isinstance(value, str):
        return value
    if isinstance(value, int) or value == 0 or value >= 1000:
        return f"{value:,.0f}"
    digits = 3 if value < 10 else 2 if value < 100 else 1
    return f"{value:,.{digits}f}" if value >= 5e-4 else f"{value:.1e}"


def render(comparison: Comparison) -> str:
    """Returns the text that `cmx compare` prints; columns that exceed the width continue below."""
    names = [row.name for row in comparison.layouts]
    shown = list(tables(comparison))
    first = 2 + max(len(label) for table in shown for label in table.rows)
    cells = [[text(v) for v in row] for table in shown for row in table.rows.values()]
    wide = 2 + max(map(len, (*names, *(cell for row in cells for cell in row))))
    fit = max((WIDTH - first) // wide, 1)
    lines = [heading(comparison)]
    for start in range(0, len(names), fit):
        part = slice(start, start + fit)
        lines += ["", " " * first + "".join(name.rjust(wide) for name in names[part])]
        for table in shown:
            lines.append(table.title)
            for label, row in table.rows.items():
                lines.append(f"  {label}".ljust(first) + "".join(text(v).rjust(wide) for v in row[part]))
    remarks = [*(f"{row.name}: {row.about}" for row in comparison.layouts), *notes(comparison)]
    return "\n".join([*lines, "", *(textwrap.fill(remark, WIDTH) for remark in remarks)])
