"""Plots of a comparison, by matplotlib, which is an optional extra and imported only when needed.

Plots are narrow, so that a phone shows them at a readable size. Colours are Okabe and Ito's, which people who
see red and green alike can tell apart; from the ninth on, bars are hatched too.
"""

from typing import TYPE_CHECKING, Any

import numpy as np

from cmx_jax.analysis.compare.comparison import Comparison, LayoutRow
from cmx_jax.analysis.compare.comparison_tables import UNITS, text, unit
from cmx_jax.analysis.plotting import COLOURS, STYLE, need_matplotlib

if TYPE_CHECKING:
    from matplotlib.figure import Figure

HATCHES = ("", "///", "...")
WIDTH = 4.0  # inches


def plots(comparison: Comparison, ink: str = "black") -> "dict[str, Figure]":
    """Draws the figures of a comparison.

    Args:
      comparison: Comparison to draw.
      ink: Colour of lines and letters.

    Returns:
      Figures by name: `useful` and `sent` bytes, `memory`, and for each layout `traffic-NAME`, the bytes
      between nodes.

    Raises:
      CmxError: matplotlib is missing.
    """
    need_matplotlib()
    import matplotlib

    inks = ("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color", "hatch.color")
    with matplotlib.rc_context(STYLE | dict.fromkeys(inks, ink)):
        rows = comparison.layouts
        names = [row.name for row in rows]
        useful, wire = [row.payload_by_place() for row in rows], [row.wire_by_place() for row in rows]
        memory: list[dict[str, float]] = [{**row.memory} for row in rows]
        hbm = [1e9 * row.machine.hbm_gb_per_npu / row.ranks_per_npu for row in rows]
        figures = {
            "useful": _bars(names, useful, "useful bytes a rank sends", ink),
            "sent": _bars(names, wire, "bytes that leave a rank", ink),
            "memory": _bars(names, memory, "memory of a rank", ink, hbm),
        }
        sent = [size for row in rows for sender in row.node_traffic for size in sender if size > 0]
        smallest, largest = min(sent, default=1.0), max(sent, default=1.0)
        for row in rows:
            figures[f"traffic-{row.name}"] = _map(row, smallest, largest, ink)
    return figures


def _bars(
    names: list[str],
    values: list[dict[str, float]],
    title: str,
    ink: str,
    limits: list[float] | None = None,
) -> "Figure":
    """Draws a stacked bar of bytes for each layout.

    Args:
      names: Names of the layouts.
      values: Bytes of each layout, by label.
      title: Title of the axis, without its unit.
      ink: Colour of edges and lines.
      limits: Bytes of HBM of each layout's rank, drawn as a line across its bar.
    """
    from matplotlib.figure import Figure

    labels = list(dict.fromkeys(label for sizes in values for label in sizes))
    power = unit(max((sum(sizes.values()) for sizes in values), default=0))
    scale, rows = 1000.0**power, np.arange(len(names))
    columns = 1 if max(map(len, labels), default=0) > 22 else 2
    legend = -(-(len(labels) + bool(limits)) // columns)
    figure = Figure((WIDTH, 1.0 + 0.34 * len(names) + 0.22 * legend), layout="constrained", label=title)
    axes: Any = figure.subplots()
    left = np.zeros(len(names))
    for i, label in enumerate(labels):
        widths = np.array([sizes.get(label, 0.0) for sizes in values]) / scale
        colour, hatch = COLOURS[i % len(COLOURS)], HATCHES[i // len(COLOURS) % len(HATCHES)]
        nonzero = widths > 0  # the edge of a bar without width would be a line
        look = {"color": colour, "hatch": hatch, "edgecolor": ink, "linewidth": 0.4}
        axes.barh(rows[nonzero], widths[nonzero], 0.7, left[nonzero], label=label, **look)
        left += widths
    if limits:
        axes.vlines(
            np.array(limits) / scale,
            rows - 0.45,
            rows + 0.45,
            ink,
            linewidth=2,
            linestyle="dashed",
            label="HBM",
        )
    axes.set_yticks(rows, names)
    axes.invert_yaxis()
    axes.set_xlabel(f"{title}, {UNITS[power]}B")
    axes.locator_params(axis="x", nbins=5)
    figure.legend(loc="outside lower center", ncols=columns, frameon=False)
    return figure


def _map(row: LayoutRow, smallest: float, largest: float, ink: str) -> "Figure":
    """Draws the bytes from each node (down) to each node (across), with all nodes of the machine.

    Args:
      row: Layout whose traffic is drawn.
      smallest, largest: Range of the colours in bytes, the same for all layouts.
      ink: Colour of the background where nothing is sent, at 7 % opacity.
    """
    from matplotlib.colors import LogNorm, to_rgb
    from matplotlib.figure import Figure

    sent = np.array(row.node_traffic)
    size, scale = max(row.machine.nodes, len(sent)), 1000.0 ** unit(largest)
    shown = np.ma.masked_equal(np.zeros((size, size)), 0)
    shown[: len(sent), : len(sent)] = np.ma.masked_equal(sent / scale, 0)
    figure = Figure((WIDTH, 1.12 * WIDTH), layout="constrained", label=f"traffic of {row.name}")
    axes: Any = figure.subplots()
    axes.set_facecolor((*to_rgb(ink), 0.07))
    norm: Any = LogNorm(min(smallest, largest / 10) / scale, largest / scale)
    drawn = axes.imshow(shown, "cividis", norm, interpolation="none")
    ticks = range(0, size, 8)
    axes.set_xticks(ticks)
    axes.set_yticks(ticks)
    axes.set_xlabel("to node")
    axes.set_ylabel("from node")
    axes.set_title(f"{row.name} on {row.machine.name}", fontsize="medium")
    marks = np.geomspace(norm.vmin, norm.vmax, 4)
    bar: Any = figure.colorbar(drawn, location="bottom", shrink=0.9, ticks=marks)
    bar.set_ticks(marks, labels=[text(v) for v in marks.tolist()], minor=False)
    bar.minorticks_off()
    bar.set_label(f"{UNITS[unit(largest)]}B a step")
    return figure
