"""What a measurement says, under the names of vLLM's `benchmark_serving`."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from cmx_jax.analysis.bench.client import Outcome
from cmx_jax.analysis.bench.load import Load
from cmx_jax.analysis.simulate.report import spread
from cmx_jax.errors import CmxError

METRICS = {
    "ttft": "Time to First Token",
    "tpot": "Time per Output Token (excl. 1st token)",
    "itl": "Inter-token Latency",
    "e2el": "End-to-end Latency",
}
OBJECTIVES = ("ttft", "tpot", "e2el")
SHOWN = 5  # reasons of failures in the table
WARM = (
    "{:.1%} of prompt tokens came out of a prefix cache: latencies are better than those of new prompts; "
    "for these restart the server or change --seed"
)


@dataclass(frozen=True)
class Wanted:
    """What to report, as flags say it.

    Attributes:
      metrics: some of `METRICS`, with commas.
      percentiles: numbers in [0, 100], with commas.
      goodput: `NAME:MS`, the most milliseconds of some of `OBJECTIVES`, for requests that count as good.

    Raises:
      CmxError: one of them is something else.
    """

    metrics: str = ",".join(METRICS)
    percentiles: str = "99"
    goodput: Sequence[str] = ()

    def __post_init__(self) -> None:
        self.names(), self.numbers(), self.objectives()

    def names(self) -> list[str]:
        """Metrics."""
        found = self.metrics.split(",")
        if not set(found) <= set(METRICS):
            raise CmxError(f"percentile_metrics is {self.metrics!r}, expected some of {','.join(METRICS)}")
        return found

    def numbers(self) -> list[float]:
        """Percentiles."""
        try:
            found = [float(number) for number in self.percentiles.split(",")]
            if not all(0 <= number <= 100 for number in found):
                raise ValueError
        except ValueError:
            raise CmxError(
                f"metric_percentiles is {self.percentiles!r}, expected numbers from 0 to 100 such as 50,90,99"
            ) from None
        return found

    def objectives(self) -> dict[str, float]:
        """Most milliseconds by metric."""
        found: dict[str, float] = {}
        for text in self.goodput:
            name, _, ms = text.partition(":")
            try:
                found[name] = float(ms)
            except ValueError:
                found[name] = 0.0
            if name not in OBJECTIVES or not found[name] > 0:
                raise CmxError(
                    f"goodput is {text!r}, expected ttft:MS, tpot:MS or e2el:MS with milliseconds above zero"
                )
        return found


def summary(load: Load, wanted: Wanted) -> dict[str, Any]:
    """The numbers of a measurement, then each request's.

    `ttft`: time to first token, from when a request was sent; `tpot`: mean time of each further token, of
    requests that have any; `itl`: gaps between chunks; `e2el`: until the end. Only of completed requests.

    Args:
      load: what was measured.
      wanted: which numbers.
    """
    every = [load.outcomes[number] for number in sorted(load.outcomes)]
    done, span = [o for o in every if not o.error], max(load.duration, 1e-12)
    inputs, outputs, cached = (
        sum(getattr(o, f"{kind}_tokens") for o in done) for kind in ("prompt", "output", "cached")
    )
    objectives = wanted.objectives()
    good = sum(_meets(o, objectives) for o in done) / span if objectives else None
    hits = cached / inputs if inputs else 0.0
    found: dict[str, Any] = {
        "duration": load.duration,
        "completed": len(done),
        "failed": len(every) - len(done),
        "interrupted": len(load.asks) - len(every),
        "total_input_tokens": inputs,
        "total_output_tokens": outputs,
        "request_throughput": len(done) / span,
        "request_goodput": good,
        "output_throughput": outputs / span,
        "total_token_throughput": (inputs + outputs) / span,
        "total_cached_tokens": cached,
        "prefix_cache_hit_rate": hits,
        "mean_tokens_per_chunk": outputs / max(sum(len(o.chunks) for o in done), 1),
        "warnings": [WARM.format(hits)] if cached else [],
        "failures": _failures(every),
    }
    samples = {
        "ttft": [o.ttft for o in done],
        "tpot": [o.tpot for o in done if o.output_tokens > 1],
        "itl": [gap for o in done for gap in o.itls],
        "e2el": [o.e2el for o in done],
    }
    for name in wanted.names():
        found |= spread(name, np.array(samples[name]), wanted.numbers())
    return found | _each(every, load.began or 0.0)


def _meets(o: Outcome, objectives: dict[str, float]) -> bool:
    return all(getattr(o, name) * 1e3 <= most for name, most in objectives.items())


def _failures(every: Sequence[Outcome]) -> list[dict[str, Any]]:
    """Reasons, the most frequent first, each with what was said first."""
    first: dict[str, str] = {}
    counts: Counter[str] = Counter()
    for o in every:
        if o.error:
            reason, _, said = o.error.partition(": ")
            first.setdefault(reason, said)
            counts[reason] += 1
    return [
        {"reason": reason, "count": count, "first": first[reason]} for reason, count in counts.most_common()
    ]


def _each(every: Sequence[Outcome], began: float) -> dict[str, list[Any]]:
    """Columns of all requests in order, seconds; where one failed only when it began and how long it took."""
    return {
        "input_lens": [0 if o.error else o.prompt_tokens for o in every],
        "output_lens": [0 if o.error else o.output_tokens for o in every],
        "start_times": [o.start - began for o in every],
        "ttfts": [0.0 if o.error else o.ttft for o in every],
        "itls": [[] if o.error else o.itls for o in every],
        "e2els": [o.e2el for o in every],
        "generated_texts": [o.text for o in every],
        "errors": [o.error for o in every],
    }


def render(result: dict[str, Any]) -> str:
    """The report for a terminal."""
    r = result
    lines = [f"{' Serving Benchmark Result ':=^60}"]

    def row(name: str, value: float, digits: int = 2) -> None:
        lines.append(f"{name + ':':<44}{value:>16,.{digits}f}")

    row("Successful requests", r["completed"], 0)
    row("Failed requests", r["failed"], 0)
    if r["interrupted"]:
        row("Interrupted or not sent", r["interrupted"], 0)
    row("Benchmark duration (s)", r["duration"])
    row("Total input tokens", r["total_input_tokens"], 0)
    row("Total generated tokens", r["total_output_tokens"], 0)
    row("Request throughput (req/s)", r["request_throughput"])
    if r["request_goodput"] is not None:
        row("Request goodput (req/s)", r["request_goodput"])
    row("Output token throughput (tok/s)", r["output_throughput"])
    row("Total token throughput (tok/s)", r["total_token_throughput"])
    row("Prefix cache hit rate (%)", 100 * r["prefix_cache_hit_rate"])
    row("Tokens per chunk", r["mean_tokens_per_chunk"])
    for name, title in METRICS.items():
        if f"mean_{name}_ms" in r:
            lines.append(f"{title:-^60}")
            of = [key for key in r if key.endswith(f"_{name}_ms")]
            for key in of:
                row(f"{key.removesuffix(f'_{name}_ms').capitalize()} {name.upper()} (ms)", r[key])
    lines.append("=" * 60)
    if "mean_itl_ms" in r:
        lines.append("ITL is the gap between chunks; with MTP a chunk may hold several tokens.")
    lines += [f"warning: {text}" for text in r["warnings"]]
    lines += [f"failed: {x['count']} x {x['reason']}: {x['first']}" for x in r["failures"][:SHOWN]]
    return "\n".join(lines)
