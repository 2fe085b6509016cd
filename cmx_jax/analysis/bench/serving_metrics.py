"""Metrics of a measurement, under the names of vLLM's `benchmark_serving`."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from cmx_jax.analysis.bench.client import RequestOutcome
from cmx_jax.analysis.bench.load_generator import LoadGenerator
from cmx_jax.analysis.bench.options import METRICS, ReportOptions
from cmx_jax.analysis.simulate.simulation_metrics import Latency

SHOWN = 5  # reasons of failures in the table, at most
WARM = (
    "{:.1%} of prompt tokens came out of a prefix cache: latencies are better than those of new prompts; "
    "for these restart the server or change --seed"
)


@dataclass(frozen=True)
class FailureCount:
    """Failures with one reason.

    Attributes:
      reason: Text before the colon of the requests' errors.
      count: Number of requests.
      first: Text after the colon of the first such error.
    """

    reason: str
    count: int
    first: str


@dataclass(frozen=True)
class RequestColumns:
    """Numbers of all requests that ended, in order of sending; times in seconds.

    A failed request has only a start time, an end-to-end latency, the text so far and an error.

    Attributes:
      input_lens: Prompt tokens.
      output_lens: Generated tokens.
      start_times: Times of sending, from the beginning of the measurement.
      ttfts: Times to first token.
      itls: Gaps between chunks.
      e2els: End-to-end latencies.
      generated_texts: Answers.
      errors: Empty texts, or reasons of failures.
    """

    input_lens: list[int]
    output_lens: list[int]
    start_times: list[float]
    ttfts: list[float]
    itls: list[list[float]]
    e2els: list[float]
    generated_texts: list[str]
    errors: list[str]

    @classmethod
    def of(cls, outcomes: Sequence[RequestOutcome], began: float) -> "RequestColumns":
        """Columns of outcomes; `began` is the beginning in seconds of `time.perf_counter`."""
        return cls(
            input_lens=[0 if o.error else o.prompt_tokens for o in outcomes],
            output_lens=[0 if o.error else o.output_tokens for o in outcomes],
            start_times=[o.start - began for o in outcomes],
            ttfts=[0.0 if o.error else o.ttft for o in outcomes],
            itls=[[] if o.error else o.itls for o in outcomes],
            e2els=[o.e2el for o in outcomes],
            generated_texts=[o.text for o in outcomes],
            errors=[o.error for o in outcomes],
        )


@dataclass(frozen=True)
class BenchmarkSummary:
    """Metrics of a measurement; throughputs and latencies are of completed requests only.

    Attributes:
      duration: Seconds from the first request to the end.
      completed: Number of completed requests.
      failed: Number of failed requests.
      interrupted: Number of requests that were not sent or had not ended.
      total_input_tokens: Prompt tokens.
      total_output_tokens: Generated tokens.
      request_throughput: Requests per second.
      request_goodput: Requests per second that meet all objectives; None without objectives.
      output_throughput: Generated tokens per second.
      total_token_throughput: Prompt and generated tokens per second.
      total_cached_tokens: Prompt tokens that came from a prefix cache.
      prefix_cache_hit_rate: Fraction of the prompt tokens that came from a prefix cache.
      mean_tokens_per_chunk: Generated tokens per chunk.
      warnings: Remarks about the measurement.
      failures: Failures by reason, the most frequent ones first.
      latencies: Latencies by name. `ttft` (time to first token): from sending; `tpot`: mean time of each
        further token, of requests that have any; `itl`: gaps between chunks; `e2el`: from sending until the
        end.
      requests: Numbers of each request.
    """

    duration: float
    completed: int
    failed: int
    interrupted: int
    total_input_tokens: int
    total_output_tokens: int
    request_throughput: float
    request_goodput: float | None
    output_throughput: float
    total_token_throughput: float
    total_cached_tokens: int
    prefix_cache_hit_rate: float
    mean_tokens_per_chunk: float
    warnings: list[str]
    failures: list[FailureCount]
    latencies: Mapping[str, Latency]
    requests: RequestColumns

    def as_dict(self) -> dict[str, object]:
        """The document of `cmx bench serve --json`, after its settings."""
        document = {**vars(self), "failures": [vars(failure) for failure in self.failures]}
        del document["latencies"], document["requests"]
        for name, latency in self.latencies.items():
            document |= latency.as_dict(name)
        return document | vars(self.requests)


def summary(load: LoadGenerator, options: ReportOptions) -> BenchmarkSummary:
    """Computes the metrics of a measurement.

    Args:
      load: Load generator after its run.
      options: Metrics to report.
    """
    outcomes = [load.outcomes[number] for number in sorted(load.outcomes)]
    completed, span = [o for o in outcomes if not o.error], max(load.duration, 1e-12)
    inputs, outputs, cached = (
        sum(getattr(o, f"{kind}_tokens") for o in completed) for kind in ("prompt", "output", "cached")
    )
    limits = options.objectives()
    samples = {
        "ttft": [o.ttft for o in completed],
        "tpot": [o.tpot for o in completed if o.output_tokens > 1],
        "itl": [gap for o in completed for gap in o.itls],
        "e2el": [o.e2el for o in completed],
    }
    hit_rate, numbers = cached / inputs if inputs else 0.0, options.numbers()
    return BenchmarkSummary(
        duration=load.duration,
        completed=len(completed),
        failed=len(outcomes) - len(completed),
        interrupted=len(load.requests) - len(outcomes),
        total_input_tokens=inputs,
        total_output_tokens=outputs,
        request_throughput=len(completed) / span,
        request_goodput=sum(_meets(o, limits) for o in completed) / span if limits else None,
        output_throughput=outputs / span,
        total_token_throughput=(inputs + outputs) / span,
        total_cached_tokens=cached,
        prefix_cache_hit_rate=hit_rate,
        mean_tokens_per_chunk=outputs / max(sum(len(o.chunks) for o in completed), 1),
        warnings=[WARM.format(hit_rate)] if cached else [],
        failures=_failures(outcomes),
        latencies={name: Latency.of(np.array(samples[name]), numbers) for name in options.names()},
        requests=RequestColumns.of(outcomes, load.began or 0.0),
    )


def _meets(o: RequestOutcome, limits: Mapping[str, float]) -> bool:
    return all(getattr(o, name) * 1e3 <= limit for name, limit in limits.items())


def _failures(outcomes: Sequence[RequestOutcome]) -> list[FailureCount]:
    """Counts failures by reason, the most frequent ones first."""
    first: dict[str, str] = {}
    counts: Counter[str] = Counter()
    for o in outcomes:
        if o.error:
            reason, _, text = o.error.partition(": ")
            first.setdefault(reason, text)
            counts[reason] += 1
    return [FailureCount(reason, count, first[reason]) for reason, count in counts.most_common()]


def render(s: BenchmarkSummary) -> str:
    """Formats the metrics for a terminal."""
    lines = [f"{' Serving Benchmark Result ':=^60}"]

    def row(name: str, value: float, digits: int = 2) -> None:
        lines.append(f"{name + ':':<44}{value:>16,.{digits}f}")

    row("Successful requests", s.completed, 0)
    row("Failed requests", s.failed, 0)
    if s.interrupted:
        row("Interrupted or not sent", s.interrupted, 0)
    row("Benchmark duration (s)", s.duration)
    row("Total input tokens", s.total_input_tokens, 0)
    row("Total generated tokens", s.total_output_tokens, 0)
    row("Request throughput (req/s)", s.request_throughput)
    if s.request_goodput is not None:
        row("Request goodput (req/s)", s.request_goodput)
    row("Output token throughput (tok/s)", s.output_throughput)
    row("Total token throughput (tok/s)", s.total_token_throughput)
    row("Prefix cache hit rate (%)", 100 * s.prefix_cache_hit_rate)
    row("Tokens per chunk", s.mean_tokens_per_chunk)
    for name, title in METRICS.items():
        if name in s.latencies:
            lines.append(f"{title:-^60}")
            for key, value in s.latencies[name].as_dict(name).items():
                row(f"{key.removesuffix(f'_{name}_ms').capitalize()} {name.upper()} (ms)", value)
    lines.append("=" * 60)
    if "itl" in s.latencies:
        lines.append("ITL is the gap between chunks; with MTP a chunk may hold several tokens.")
    lines += [f"warning: {text}" for text in s.warnings]
    lines += [f"failed: {x.count} x {x.reason}: {x.first}" for x in s.failures[:SHOWN]]
    return "\n".join(lines)
