"""Figures of `cmx predict --paper` and `cmx plan`, in the look of `cmx compare`'s plots."""

from pathlib import Path
from typing import Any

from cmx_jax.analysis.cost.measured import PaperRow
from cmx_jax.analysis.plan.plan import Plan
from cmx_jax.analysis.plotting import COLOURS, STYLE, image, need_matplotlib
from cmx_jax.analysis.predict.candidates import InstancePlan
from cmx_jax.analysis.predict.paper import PaperReport
from cmx_jax.analysis.writing import need_folder, write_whole
from cmx_jax.errors import CmxError

GREY, WIDE = "#BBBBBB", 7.0  # inches
TICKS = (-100, -30, -10, -5, 0, 5, 10, 30, 100)
ROLES = {"calibrated": COLOURS[7], "predicted": COLOURS[0]}
BOX = {"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 0.5}


class Folder:
    """A folder for figures, checked before anything is computed.

    Args:
      path: Path of the folder, which is made if its parent exists; None writes nothing.

    Raises:
      CmxError: The folder cannot be made, or matplotlib is missing.
    """

    def __init__(self, path: str | None):
        self.path = None if path is None else Path(path)
        if self.path is None:
            return
        need_matplotlib()
        need_folder(self.path if self.path.exists() else self.path.parent)

    def write(self, name: str, figure: Any) -> None:
        """Writes a figure as PNG and SVG.

        Args:
          name: Name of the files, without suffix.
          figure: Figure of matplotlib.

        Raises:
          CmxError: A file cannot be written; its former content is still there.
        """
        if self.path is None:
            return
        try:
            self.path.mkdir(exist_ok=True)
        except OSError as error:
            raise CmxError(f"{self.path} cannot be made: {error.strerror}") from None
        for kind in ("png", "svg"):
            write_whole(self.path / f"{name}.{kind}", image(figure, kind))


def paper_errors(report: PaperReport) -> Any:
    """Draws the error of each published row's prediction, by group."""
    import matplotlib
    from matplotlib.figure import Figure

    rows = report.rows
    groups = list(dict.fromkeys(row.group for row in rows))
    counts = [sum(row.group == group for row in rows) for group in groups]
    with matplotlib.rc_context(STYLE):
        size = (WIDE, 0.6 + 0.15 * len(rows) + 0.5 * len(groups))
        figure = Figure(size, layout="constrained", label="published and predicted")
        panels: Any = figure.subplots(len(groups), 1, sharex=True, height_ratios=counts, squeeze=False)
        for axes, group in zip(panels[:, 0], groups, strict=True):
            _errors(axes, [row for row in rows if row.group == group], group)
        panels[-1, 0].set_xlabel("error of the prediction, %; beyond 10 on a logarithmic scale", fontsize=8)
        marks = [matplotlib.patches.Patch(color=colour, label=role) for role, colour in ROLES.items()]
        figure.legend(handles=marks, loc="outside lower center", ncols=2, frameon=False, fontsize=8)
    return figure


def _errors(axes: Any, rows: list[PaperRow], group: str) -> None:
    """Draws a bar for each row of a group."""
    errors, positions = [100 * row.error for row in rows], range(len(rows))
    axes.barh(positions, errors, 0.7, color=[ROLES[row.role] for row in rows])
    axes.set_yticks(positions, [f"{row.name}, {row.unit} ({row.table})" for row in rows])
    axes.set_ylim(len(rows) - 0.4, -0.6)
    numbers = axes.secondary_yaxis("right")
    numbers.set_yticks(positions, [f"{row.published:,.4g} → {row.predicted:,.4g}" for row in rows])
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


def front(plan: Plan) -> Any:
    """Draws the decode instances of a plan, ms a token against tokens/s of an NPU, and their Pareto front."""
    import matplotlib
    from matplotlib.figure import Figure

    slo = plan.request.workload.slo_tpot_ms
    with matplotlib.rc_context(STYLE):
        figure = Figure((WIDE, 4.5), layout="constrained", label="Pareto front of decode")
        axes: Any = figure.subplots()
        axes.scatter(*_points(plan.search.decode), 12, GREY, label="candidates")
        label = "no other has more of both"
        axes.plot(*_points(plan.search.pareto), "o-", color=COLOURS[0], markersize=4, label=label)
        best = [served.deployment.decode for served in plan.deployments]
        rings = {"facecolors": "none", "edgecolors": COLOURS[5]}
        axes.scatter(*_points(best), s=110, linewidths=1.5, **rings, label="of the best deployments")
        axes.axvline(slo, color=COLOURS[5], linestyle="dashed", linewidth=1, label=f"SLO, {slo:g} ms")
        for x in plan.search.pareto:
            text = x.sizes.replace(", microbatches", "\nmicrobatches")
            axes.annotate(
                text,
                (x.latency_ms, x.tokens_per_s),
                xytext=(-5, 4),
                textcoords="offset points",
                ha="right",
                fontsize=6.5,
                bbox=BOX,
            )
        axes.set_xlabel("ms a token")
        axes.set_ylabel("tokens/s of an NPU")
        axes.set_xlim(left=0)
        axes.set_ylim(bottom=0)
        figure.legend(loc="outside lower center", ncols=4, frameon=False, fontsize="small")
    return figure


def _points(instances: list[InstancePlan]) -> tuple[list[float], list[float]]:
    """Returns ms per token and tokens/s of an NPU for decode instances."""
    return [x.latency_ms for x in instances], [x.tokens_per_s for x in instances]
