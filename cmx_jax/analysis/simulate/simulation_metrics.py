"""Metrics of a simulation, under the names of vLLM's `benchmark_serving` where it has them."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from cmx_jax.analysis.simulate.supernodes import SimulationOutcome
from cmx_jax.errors import CmxError

PERCENTILES = (50, 90, 99)


@dataclass(frozen=True)
class Latency:
    """Statistics of one latency over requests, in milliseconds.

    Attributes:
      mean: Arithmetic mean.
      median: Median.
      std: Standard deviation.
      percentiles: Percentiles by their number, such as 99.
    """

    mean: float
    median: float
    std: float
    percentiles: Mapping[float, float]

    @classmethod
    def of(cls, seconds: np.ndarray, percentiles: Sequence[float] = PERCENTILES) -> "Latency":
        """Statistics of samples in seconds; zeros if there are no samples."""
        ms = seconds * 1e3 if len(seconds) else np.zeros(1)
        by_number = {p: float(np.percentile(ms, p)) for p in percentiles}
        return cls(float(ms.mean()), float(np.median(ms)), float(ms.std()), by_number)

    def as_dict(self, name: str) -> dict[str, float]:
        """Entries such as `mean_ttft_ms` and `p99_ttft_ms`, for a latency called `name`."""
        entries = {"mean": self.mean, "median": self.median, "std": self.std}
        entries |= {f"p{p:g}": value for p, value in self.percentiles.items()}
        return {f"{statistic}_{name}_ms": value for statistic, value in entries.items()}


@dataclass(frozen=True)
class Goodput:
    """Requests that meet the service-level objectives (SLO).

    Attributes:
      slo_ttft_ms: Largest time to first token, in milliseconds; None: any.
      slo_tpot_ms: Largest mean time of each further token, in milliseconds; None: any.
      request_goodput: Requests per second that meet both objectives.
      slo_attainment: Fraction of all requests that meet both objectives.
    """

    slo_ttft_ms: float | None
    slo_tpot_ms: float | None
    request_goodput: float
    slo_attainment: float


@dataclass(frozen=True)
class SimulationSummary:
    """Metrics of a simulation.

    Attributes:
      completed: Number of requests.
      duration: Seconds from the first arrival to the last token.
      total_input_tokens: Prompt tokens of all requests.
      total_output_tokens: Generated tokens of all requests.
      request_throughput: Requests per second.
      output_throughput: Generated tokens per second.
      total_token_throughput: Prompt and generated tokens per second.
      supernodes: Number of supernodes.
      npus: NPUs of all supernodes.
      output_throughput_per_npu: Generated tokens per second and NPU.
      total_token_throughput_per_npu: Prompt and generated tokens per second and NPU.
      prefix_hit_rate: Fraction of the prompt tokens that came from the prefix cache.
      latencies: Latencies by name. `queue`: from arrival until the first chunk begins to run; `ttft` (time to
        first token): from arrival; `tpot`: mean time of each further token, of requests that have any;
        `e2el`: from arrival until the last token.
      goodput: Requests that meet the objectives; None if there are no objectives.
      prefill_utilization: Fraction of the time in which a prefill instance ran a step.
      decode_utilization: Fraction of the time in which a decode instance ran a step.
      mean_decode_batch: Sequences of a decode instance's batch, averaged over time.
    """

    completed: int
    duration: float
    total_input_tokens: int
    total_output_tokens: int
    request_throughput: float
    output_throughput: float
    total_token_throughput: float
    supernodes: int
    npus: int
    output_throughput_per_npu: float
    total_token_throughput_per_npu: float
    prefix_hit_rate: float
    latencies: Mapping[str, Latency]
    goodput: Goodput | None
    prefill_utilization: float
    decode_utilization: float
    mean_decode_batch: float

    def as_dict(self) -> dict[str, object]:
        """The document that `cmx simulate --json` prints."""
        document: dict[str, object] = {}
        for name, value in vars(self).items():
            if name == "latencies":
                for latency, statistics in self.latencies.items():
                    document |= statistics.as_dict(latency)
            elif name == "goodput":
                document |= vars(self.goodput) if self.goodput else {}
            else:
                document[name] = value
        return document


def summary(
    outcome: SimulationOutcome, slo_ttft_ms: float | None = None, slo_tpot_ms: float | None = None
) -> SimulationSummary:
    """Computes the metrics of a simulation.

    Args:
      outcome: Times and tokens of all requests.
      slo_ttft_ms: Objective for the time to first token, in milliseconds; None: none.
      slo_tpot_ms: Objective for the mean time of each further token, in milliseconds; None: none.

    Raises:
      CmxError: An objective is not above zero.
    """
    for name, slo in (("slo_ttft_ms", slo_ttft_ms), ("slo_tpot_ms", slo_tpot_ms)):
        if slo is not None and not 0 < slo < math.inf:
            raise CmxError(f"{name} is {slo:g}, expected above zero")
    c, nodes = outcome.columns, outcome.nodes
    duration = float(c["finished"].max() - c["arrived"].min())
    ttft, later = c["first_token"] - c["arrived"], np.maximum(c["output"] - 1, 1)
    tpot = (c["finished"] - c["first_token"]) / later
    inputs, outputs, cached = (int(c[name].sum()) for name in ("prompt", "output", "cached"))
    span, npus = max(duration, 1e-12), outcome.deployment.npus * len(nodes)
    goodput = None
    if slo_ttft_ms is not None or slo_tpot_ms is not None:
        good = (ttft * 1e3 <= (slo_ttft_ms or math.inf)) & (tpot * 1e3 <= (slo_tpot_ms or math.inf))
        goodput = Goodput(slo_ttft_ms, slo_tpot_ms, float(good.sum()) / span, float(good.mean()))
    prefill = [instance for node in nodes for instance in node.scheduler.prefill]
    decode = [instance for node in nodes for instance in node.scheduler.decoders]
    return SimulationSummary(
        completed=len(ttft),
        duration=duration,
        total_input_tokens=inputs,
        total_output_tokens=outputs,
        request_throughput=len(ttft) / span,
        output_throughput=outputs / span,
        total_token_throughput=(inputs + outputs) / span,
        supernodes=len(nodes),
        npus=npus,
        output_throughput_per_npu=outputs / span / npus,
        total_token_throughput_per_npu=(inputs + outputs) / span / npus,
        prefix_hit_rate=cached / inputs,
        latencies={
            "queue": Latency.of(c["started"] - c["arrived"]),
            "ttft": Latency.of(ttft),
            "tpot": Latency.of(tpot[c["output"] > 1]),
            "e2el": Latency.of(c["finished"] - c["arrived"]),
        },
        goodput=goodput,
        prefill_utilization=float(np.mean([instance.busy for instance in prefill])) / span,
        decode_utilization=float(np.mean([instance.busy for instance in decode])) / span,
        mean_decode_batch=float(np.mean([instance.row_seconds for instance in decode])) / span,
    )


TITLES = {
    "queue": "waiting",
    "ttft": "time to first token",
    "tpot": "time per output token",
    "e2el": "whole",
}


def render(s: SimulationSummary) -> str:
    """Formats the metrics for a terminal."""
    lines = [
        f"{s.completed:,} requests in {s.duration:,.1f} s on {s.npus:,} NPUs of {s.supernodes} "
        f"supernode(s): {s.total_input_tokens:,} tokens in, {s.total_output_tokens:,} out",
        f"{s.request_throughput:,.2f} requests/s, {s.output_throughput:,.1f} output tokens/s "
        f"({s.output_throughput_per_npu:,.1f} an NPU), {s.total_token_throughput:,.1f} in all",
        f"{'ms':<24}{'mean':>12}" + "".join(f"{f'p{p}':>12}" for p in PERCENTILES),
    ]
    for name, latency in s.latencies.items():
        numbers = (latency.mean, *latency.percentiles.values())
        lines.append(f"{TITLES[name]:<24}" + "".join(f"{number:>12,.1f}" for number in numbers))
    if s.goodput:
        slos = (("TTFT", s.goodput.slo_ttft_ms), ("TPOT", s.goodput.slo_tpot_ms))
        limits = " and ".join(f"{slo:g} ms {name}" for name, slo in slos if slo)
        goodput = f"{s.goodput.request_goodput:,.2f} requests/s"
        lines.append(f"goodput {goodput}: {s.goodput.slo_attainment:.1%} within {limits}")
    lines.append(
        f"busy: prefill {s.prefill_utilization:.1%}, decode {s.decode_utilization:.1%} with "
        f"{s.mean_decode_batch:,.1f} sequences an instance; from the prefix cache: "
        f"{s.prefix_hit_rate:.1%} of prompt tokens"
    )
    return "\n".join(lines)
