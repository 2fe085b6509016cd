"""A picture of a measurement: each request's wait and answer, and below them what came in each moment."""

from typing import Any

import numpy as np

from cmx_jax.analysis.plotting import COLOURS, STYLE, need_matplotlib

WIDTH, BINS = 7.0, 60  # inches, across the whole time
WAIT, ANSWER, FAILED = COLOURS[1], COLOURS[0], COLOURS[5]
TALLEST, GREY = 6.0, "#BBBBBB"  # inches of all bars


def timeline(d: dict[str, Any]) -> Any:
    """A figure: time to the right, requests by their start downwards, output tokens a second below.

    Args:
      d: what `summary` gave.

    Raises:
      CmxError: matplotlib is missing.
    """
    need_matplotlib()
    import matplotlib
    from matplotlib.figure import Figure

    count = len(d["start_times"])
    tall = min(TALLEST, 0.8 + 0.07 * count)
    with matplotlib.rc_context(STYLE):
        figure = Figure((WIDTH, tall + 2.6), layout="constrained", label="timeline")
        bars, rate = figure.subplots(2, 1, sharex=True, height_ratios=(tall, 1.5))
        _requests(bars, d)
        _rate(rate, d)
        rate.set_xlim(0, d["duration"] or 1)
        rate.set_xlabel("seconds")
        done = f"{d['completed']:,} of {count:,} requests completed"
        title = f"{done}, {d['output_throughput']:,.1f} output tokens/s"
        bars.set_title(title, loc="left", fontsize="medium")
        figure.legend(loc="outside lower center", ncols=5, frameon=False, fontsize="small")
    return figure


def _requests(axes: Any, d: dict[str, Any]) -> None:
    """A bar for each request; a grey one with a cross at its end if it failed."""
    start, ttft, e2el = (np.array(d[name]) for name in ("start_times", "ttfts", "e2els"))
    row = np.argsort(np.argsort(start, kind="stable"))
    failed = np.array([bool(error) for error in d["errors"]], bool)
    done = ~failed
    at, first = row[done], (start + ttft)[done]
    axes.barh(at, ttft[done], 0.8, start[done], color=WAIT, label="until the first token")
    axes.barh(at, (e2el - ttft)[done], 0.8, first, color=ANSWER, label="answer")
    if len(start) <= 100:  # thinner bars have no room for it
        axes.vlines(first, at - 0.4, at + 0.4, "black", linewidth=1, label="first token")
    if failed.any():
        axes.barh(row[failed], e2el[failed], 0.8, start[failed], color=GREY)
        ends = (start + e2el)[failed], row[failed]
        axes.scatter(*ends, 14, FAILED, marker="x", linewidths=1, label="failed", clip_on=False)
    axes.set_ylim(max(len(start), 1) - 0.4, -0.6)
    axes.yaxis.get_major_locator().set_params(integer=True)
    axes.set_ylabel("request, by its start")
    axes.grid(axis="x", color=GREY, linewidth=0.4)
    axes.set_axisbelow(True)


def _rate(axes: Any, d: dict[str, Any]) -> None:
    """Tokens a second; those of an answer are dealt out evenly to its chunks."""
    edges = np.linspace(0, d["duration"] or 1, BINS + 1)
    tokens = np.zeros(BINS)
    for start, ttft, itls, count in zip(
        *(d[name] for name in ("start_times", "ttfts", "itls", "output_lens")), strict=True
    ):
        times = start + ttft + np.cumsum([0.0, *itls])
        tokens += np.histogram(times, edges, weights=np.full(len(times), count / len(times)))[0]
    axes.stairs(tokens / np.diff(edges), edges, fill=True, color=COLOURS[2])
    axes.axhline(
        d["output_throughput"], color="black", linestyle="dashed", linewidth=1, label="mean tokens/s"
    )
    axes.set_ylim(bottom=0)
    axes.set_ylabel("output tokens/s")
    axes.grid(axis="x", color=GREY, linewidth=0.4)
    axes.set_axisbelow(True)
