"""Options of a report, and the settings of a measurement."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from cmx_jax.errors import CmxError

METRICS = {
    "ttft": "Time to First Token",
    "tpot": "Time per Output Token (excl. 1st token)",
    "itl": "Inter-token Latency",
    "e2el": "End-to-end Latency",
}
OBJECTIVES = ("ttft", "tpot", "e2el")


@dataclass(frozen=True)
class ReportOptions:
    """Metrics to report, in the form of the command's flags.

    Attributes:
      metrics: Names from `METRICS`, separated by commas.
      percentiles: Numbers in [0, 100], separated by commas.
      goodput: Limits `NAME:MS` of a good request, in milliseconds; names are from `OBJECTIVES`.

    Raises:
      CmxError: A text has another form.
    """

    metrics: str = ",".join(METRICS)
    percentiles: str = "99"
    goodput: Sequence[str] = ()

    def __post_init__(self) -> None:
        self.names(), self.numbers(), self.objectives()

    def names(self) -> list[str]:
        """Names of the metrics."""
        names = self.metrics.split(",")
        if not set(names) <= set(METRICS):
            raise CmxError(f"percentile_metrics is {self.metrics!r}, expected some of {','.join(METRICS)}")
        return names

    def numbers(self) -> list[float]:
        """Numbers of the percentiles."""
        try:
            numbers = [float(number) for number in self.percentiles.split(",")]
            if not all(0 <= number <= 100 for number in numbers):
                raise ValueError
        except ValueError:
            raise CmxError(
                f"metric_percentiles is {self.percentiles!r}, expected numbers from 0 to 100 such as 50,90,99"
            ) from None
        return numbers

    def objectives(self) -> dict[str, float]:
        """Limits of a good request in milliseconds, by metric."""
        limits: dict[str, float] = {}
        for text in self.goodput:
            name, _, ms = text.partition(":")
            try:
                limits[name] = float(ms)
            except ValueError:
                limits[name] = 0.0
            if name not in OBJECTIVES or not limits[name] > 0:
                raise CmxError(
                    f"goodput is {text!r}, expected ttft:MS, tpot:MS or e2el:MS with milliseconds above zero"
                )
        return limits


@dataclass(frozen=True)
class Settings:
    """Description of a measurement.

    Attributes:
      date: Local time at the end, as `YYYYMMDD-HHMMSS`.
      backend: `openai` or `openai-chat`.
      model_id: Name of the model at the server.
      tokenizer_id: Name or path of the tokenizer.
      dataset_name: Kind of the requests.
      num_prompts: Number of requests.
      request_rate: Requests per second, infinite if all are sent at once; None for a trace.
      burstiness: Shape of the gamma-distributed intervals.
      max_concurrency: Maximum number of concurrent requests; None: no limit.
      seed: Seed of prompts, lengths and arrivals.
      ignore_eos: Flag; answers continue after an end token.
      temperature: Sampling temperature.
    """

    date: str
    backend: str
    model_id: str
    tokenizer_id: str
    dataset_name: str
    num_prompts: int
    request_rate: float | None
    burstiness: float
    max_concurrency: int | None
    seed: int
    ignore_eos: bool
    temperature: float

    def as_dict(self) -> dict[str, object]:
        """The first entries of the JSON document, in which an infinite rate is `inf`."""
        return {**vars(self), "request_rate": "inf" if self.request_rate == math.inf else self.request_rate}
