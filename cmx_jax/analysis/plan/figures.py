"""Figures of `cmx predict --paper` and `cmx plan`, in the look of `cmx compare`'s plots."""

from pathlib import Path
from typing import Any

from cmx_jax.analysis.compare.plots import COLOURS, STYLE, image, need_matplotlib
from cmx_jax.analysis.plan.plan import named
from cmx_jax.analysis.writing import need_folder, write_whole
from cmx_jax.errors import CmxError

GREY, WIDE = "#BBBBBB", 7.0  # inches
TICKS = (-100, -30, -10, -5, 0, 5, 10, 30, 100)
ROLES = {"calibrated": COLOURS[7], "predicted": COLOURS[0]}


class Folder:
    """Where figures go; looked at before anything is computed.

    Args:
      path: made if its parent is there; None: nothing is written.

    Raises:
      CmxError: there cannot be such a folder, or matplotlib is missing.
    """

    def __init__(self, path: str | None):
        self.path = None if path is None else Path(path)
        if self.path is None:
            return
        need_matplotlib()
        need_folder(self.path if self.path.exists() else self.path.parent)

    def write(self, name: str, figure: Any) -> None:
        """Writes a figure as PNG and SVG.

        Raises:
          CmxError: a file cannot be written; what was there before is still there.
        """
        if self.path is None:
            return
        try:
            self.path.mkdir(exist_ok=True)
        except OSError as error:
            raise CmxError(f"{self.path} cannot be made: {error.strerror}") from None
        for kind in ("png", "svg"):
            write_whole(self.path / f"{name}.{kind}", image(figure, kind))


def paper_errors(found: dict[str, Any]) -> Any:
    """Draws the error of each published row's prediction, by group (`analysis/predict/paper.py`)."""
    import matplotlib
    from matplotlib.figure import Figure

    rows, groups = found["rows"], list(dict.fromkeys(r["group"] for r in found["rows"]))
    counts = [sum(r["group"] == group for r in rows) for group in groups]
    with matplotlib.rc_context(STYLE):
        size = (WIDE, 0.6 + 0.15 * len(rows) + 0.5 * len(groups))
        figure = Figure(size, layout="constrained", label="published and predicted")
        every: Any = figure.subplots(len(groups), 1, sharex=True, height_ratios=counts, squeeze=False)
        for axes, group in zip(every[:, 0], groups, strict=True):
            _errors(axes, [r for r in rows if r["group"] == group], group)
        every[-1, 0].set_xlabel("error of the prediction, %; beyond 10 on a logarithmic scale", fontsize=8)
        marks = [matplotlib.patches.Patch(color=colour, label=role) for role, colour in ROLES.items()]
        figure.legend(handles=marks, loc="outside lower center", ncols=2, frameon=False, fontsize=8)
    return figure


def _errors(axes: Any, rows: list[dict[str, Any]], group: str) -> None:
    errors, at = [100 * r["error"] for r in rows], range(len(rows))
    axes.barh(at, errors, 0.7, color=[ROLES[r["role"]] for r in rows])
    axes.set_yticks(at, [f"{r['row']}, {r['unit']} ({r['table']})" for r in rows])
    axes.set_ylim(len(rows) - 0.4, -0.6)
    numbers = axes.secondary_yaxis("right")
    numbers.set_yticks(at, [f"{r['published']:,.4g} → {r['predicted']:,.4g}" for r in rows])
    for side in (axes, numbers):
        side.tick_params(axis="y", labelsize=7, length=0)
    numbers.spines["right"].set_visible(False)
    axes.set_xscale("symlog", linthresh=10, linscale=1)
    axes.set_xticks(TICKS, [f"{tick:+d}" if tick else "0" for tick in TICKS])
    axes.tick_params(axis="x", which="both", length=0, labelsize=8, labelbottom=True)
    axes.axvline(0, color="black", linewidth=0.8)
    axes.grid(axis="x", which="major", color=GREY, linewidth=0.4)
    axes.set_axisbelow(True)
    mean = sum(map(abs, errors)) / len(errors)
    title = f"{group}: mean error {mean:.1f} %"
    axes.set_title(title, loc="left", fontsize="small", fontweight="bold")


def front(found: dict[str, Any]) -> Any:
    """Decode candidates of a plan, ms a token against tokens/s of an NPU, and the front of them, named."""
    import matplotlib
    from matplotlib.figure import Figure

    best, slo = found["pareto"], found["load"]["slo_tpot_ms"]
    with matplotlib.rc_context(STYLE):
        figure = Figure((WIDE, 4.5), layout="constrained", label="Pareto front of decode")
        axes: Any = figure.subplots()
        every = found["decode"]
        axes.scatter(
            [x["tpot_ms"] for x in every],
            [x["tokens_per_s"] for x in every],
            12,
            GREY,
            label="candidates",
        )
        axes.plot(
            [x["tpot_ms"] for x in best],
            [x["tokens_per_s"] for x in best],
            "o-",
            color=COLOURS[0],
            markersize=4,
            label="no other has more of both",
        )
        chosen = [m["decode"] for m in found["deployments"]]
        marks = {"s": 110, "facecolors": "none", "edgecolors": COLOURS[5], "linewidths": 1.5}
        at = [x["tpot_ms"] for x in chosen], [x["tokens_per_s"] for x in chosen]
        axes.scatter(*at, **marks, label="of the best deployments")
        axes.axvline(slo, color=COLOURS[5], linestyle="dashed", linewidth=1, label=f"SLO, {slo:g} ms")
        for x in best:
            where: dict[str, Any] = {
                "xytext": (-5, 4),
                "textcoords": "offset points",
                "ha": "right",
                "fontsize": 6.5,
            }
            where["bbox"] = {"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 0.5}
            text = named(x).replace(", microbatches", "\nmicrobatches")
            axes.annotate(text, (x["tpot_ms"], x["tokens_per_s"]), **where)
        axes.set_xlabel("ms a token")
        axes.set_ylabel("tokens/s of an NPU")
        axes.set_xlim(left=0)
        axes.set_ylim(bottom=0)
        figure.legend(loc="outside lower center", ncols=4, frameon=False, fontsize="small")
    return figure
