"""Plots of a comparison, by matplotlib: an optional extra, asked for only here.

Narrow, so that a phone shows them at a readable size. Colours are Okabe and Ito's, which people who see red
and green alike can tell apart; what goes beyond eight is hatched.
"""

from typing import Any

import numpy as np

from cmx_jax.analysis.compare.report import UNITS, moved, text, unit
from cmx_jax.analysis.plotting import COLOURS, STYLE, need_matplotlib

HATCHES = ("", "///", "...")
WIDTH = 4.0  # inches


def plots(d: dict[str, Any], ink: str = "black") -> dict[str, Any]:
    """Figures by name: `useful` and `sent` bytes, `memory`, and `traffic-LAYOUT` between nodes.

    Args:
      d: what `compare` gave.
      ink: colour of lines and letters.

    Raises:
      CmxError: matplotlib is missing.
    """
    need_matplotlib()
    import matplotlib

    inks = ("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color", "hatch.color")
    with matplotlib.rc_context(STYLE | dict.fromkeys(inks, ink)):
        each = d["layouts"]
        found = {
            "useful": _bars(
                each, [moved(x, "payload_bytes") for x in each], "useful bytes a rank sends", ink
            ),
            "sent": _bars(each, [moved(x, "wire_bytes") for x in each], "bytes that leave a rank", ink),
            "memory": _bars(
                each,
                [x["memory"] for x in each],
                "memory of a rank",
                ink,
                [1e9 * x["machine"]["hbm_gb_per_npu"] / x["ranks_per_npu"] for x in each],
            ),
        }
        sent = [v for x in each for row in x["node_traffic"] for v in row if v > 0]
        most, least = max(sent, default=1.0), min(sent, default=1.0)
        for x in each:
            found[f"traffic-{x['name']}"] = _map(x, least, most, ink)
    return found


def _bars(
    each: list[dict[str, Any]],
    values: list[dict[str, float]],
    title: str,
    ink: str,
    limits: list[float] | None = None,
) -> Any:
    """A stacked bar for each layout, and at `limits` a line across it."""
    from matplotlib.figure import Figure

    labels = list(dict.fromkeys(label for of in values for label in of))
    power = unit(max((sum(of.values()) for of in values), default=0))
    scale, rows = 1000.0**power, np.arange(len(each))
    columns = 1 if max(map(len, labels), default=0) > 22 else 2
    legend = -(-(len(labels) + bool(limits)) // columns)
    figure = Figure((WIDTH, 1.0 + 0.34 * len(each) + 0.22 * legend), layout="constrained", label=title)
    axes: Any = figure.subplots()
    left = np.zeros(len(each))
    for i, label in enumerate(labels):
        wide = np.array([of.get(label, 0.0) for of in values]) / scale
        colour, hatch = COLOURS[i % len(COLOURS)], HATCHES[i // len(COLOURS) % len(HATCHES)]
        there = wide > 0  # the edge of nothing would be a line
        look = {"color": colour, "hatch": hatch, "edgecolor": ink, "linewidth": 0.4}
        axes.barh(rows[there], wide[there], 0.7, left[there], label=label, **look)
        left += wide
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
    axes.set_yticks(rows, [x["name"] for x in each])
    axes.invert_yaxis()
    axes.set_xlabel(f"{title}, {UNITS[power]}B")
    axes.locator_params(axis="x", nbins=5)
    figure.legend(loc="outside lower center", ncols=columns, frameon=False)
    return figure


def _map(x: dict[str, Any], least: float, most: float, ink: str) -> Any:
    """Bytes from node (down) to node (across), on all of a machine's; `least`, `most`: any layout's."""
    from matplotlib.colors import LogNorm, to_rgb
    from matplotlib.figure import Figure

    sent = np.array(x["node_traffic"])
    size, scale = max(x["machine"]["nodes"], len(sent)), 1000.0 ** unit(most)
    shown = np.ma.masked_equal(np.zeros((size, size)), 0)
    shown[: len(sent), : len(sent)] = np.ma.masked_equal(sent / scale, 0)
    figure = Figure((WIDTH, 1.12 * WIDTH), layout="constrained", label=f"traffic of {x['name']}")
    axes: Any = figure.subplots()
    axes.set_facecolor((*to_rgb(ink), 0.07))
    norm: Any = LogNorm(min(least, most / 10) / scale, most / scale)
    drawn = axes.imshow(shown, "cividis", norm, interpolation="none")
    ticks = range(0, size, 8)
    axes.set_xticks(ticks)
    axes.set_yticks(ticks)
    axes.set_xlabel("to node")
    axes.set_ylabel("from node")
    axes.set_title(f"{x['name']} on {x['machine']['name']}", fontsize="medium")
    marks = np.geomspace(norm.vmin, norm.vmax, 4)
    bar: Any = figure.colorbar(drawn, location="bottom", shrink=0.9, ticks=marks)
    bar.set_ticks(marks, labels=[text(v) for v in marks.tolist()], minor=False)
    bar.minorticks_off()
    bar.set_label(f"{UNITS[unit(most)]}B a step")
    return figure
