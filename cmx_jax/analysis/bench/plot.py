"""Timeline of a measurement: each request's wait and answer, and the output tokens per second."""

from typing import Any

import numpy as np

from cmx_jax.analysis.bench.serving_metrics import BenchmarkSummary, RequestColumns
from cmx_jax.analysis.plotting import COLOURS, STYLE, need_matplotlib

WIDTH, BINS = 7.0, 60  # inches; bins over the duration
WAIT, ANSWER, FAILED = COLOURS[1], COLOURS[0], COLOURS[5]
TALLEST, GREY = 6.0, "#BBBBBB"  # largest height of all bars in inches


def timeline(s: BenchmarkSummary) -> Any:
    """Draws a matplotlib figure: a bar for each request, in order of their starts, above a rate of tokens.

    Raises:
      CmxError: Matplotlib is missing.
    """
    need_matplotlib()
    import matplotlib
    from matplotlib.figure import Figure

    count = len(s.requests.start_times)
    tall = min(TALLEST, 0.8 + 0.07 * count)
    with matplotlib.rc_context(STYLE):
        figure = Figure((WIDTH, tall + 2.6), layout="constrained", label="timeline")
        bars, rate = figure.subplots(2, 1, sharex=True, height_ratios=(tall, 1.5))
        _requests(bars, s.requests)
        _rate(rate, s)
        rate.set_xlim(0, s.duration or 1)
        rate.set_xlabel("seconds")
        done = f"{s.completed:,} of {count:,} requests completed"
        title = f"{done}, {s.output_throughput:,.1f} output tokens/s"
        bars.set_title(title, loc="left", fontsize="medium")
        figure.legend(loc="outside lower center", ncols=5, frameon=False, fontsize="small")
    return figure


def _requests(axes: Any, r: RequestColumns) -> None:
    """Draws a bar for each request; a grey one with a cross at its end if it failed."""
    start, ttft, e2el = (np.array(column) for column in (r.start_times, r.ttfts, r.e2els))
    row = np.argsort(np.argsort(start, kind="stable"))
    failed = np.array([bool(error) for error in r.errors], bool)
    done = ~failed
    y, first = row[done], (start + ttft)[done]
    axes.barh(y, ttft[done], 0.8, start[done], color=WAIT, label="until the first token")
    axes.barh(y, (e2el - ttft)[done], 0.8, first, color=ANSWER, label="answer")
    if len(start) <= 100:  # thinner bars have no space for a line
        axes.vlines(first, y - 0.4, y + 0.4, "black", linewidth=1, label="first token")
    if failed.any():
        axes.barh(row[failed], e2el[failed], 0.8, start[failed], color=GREY)
        ends = (start + e2el)[failed], row[failed]
        axes.scatter(*ends, 14, FAILED, marker="x", linewidths=1, label="failed", clip_on=False)
    axes.set_ylim(max(len(start), 1) - 0.4, -0.6)
    axes.yaxis.get_major_locator().set_params(integer=True)
    axes.set_ylabel("request, by its start")
    axes.grid(axis="x", color=GREY, linewidth=0.4)
    axes.set_axisbelow(True)


def _rate(axes: Any, s: BenchmarkSummary) -> None:
    """Draws tokens per second; the tokens of an answer are spread evenly over its chunks."""
    edges, r = np.linspace(0, s.duration or 1, BINS + 1), s.requests
    tokens = np.zeros(BINS)
    for start, ttft, itls, count in zip(r.start_times, r.ttfts, r.itls, r.output_lens, strict=True):
        times = start + ttft + np.cumsum([0.0, *itls])
        tokens += np.histogram(times, edges, weights=np.full(len(times), count / len(times)))[0]
    axes.stairs(tokens / np.diff(edges), edges, fill=True, color=COLOURS[2])
    mean = s.output_throughput
    axes.axhline(mean, color="black", linestyle="dashed", linewidth=1, label="mean tokens/s")
    axes.set_ylim(bottom=0)
    axes.set_ylabel("output tokens/s")
    axes.grid(axis="x", color=GREY, linewidth=0.4)
    axes.set_axisbelow(True)
