"""Load generator for servers with OpenAI's API: latencies, throughput and goodput.

Names and definitions of the metrics are those of vLLM's `benchmark_serving`.
"""

from cmx_jax.analysis.bench.client import Client, EventParser, RequestOutcome
from cmx_jax.analysis.bench.load_generator import LoadGenerator, measure
from cmx_jax.analysis.bench.options import ReportOptions, Settings
from cmx_jax.analysis.bench.plot import timeline
from cmx_jax.analysis.bench.prompts import BenchRequest, Words, check_lengths, drawn, prefixed, replayed
from cmx_jax.analysis.bench.result_files import OutputFiles
from cmx_jax.analysis.bench.serving_metrics import BenchmarkSummary, RequestColumns, render, summary
from cmx_jax.analysis.bench.target import Target

__all__ = [
    "BenchRequest",
    "BenchmarkSummary",
    "Client",
    "EventParser",
    "LoadGenerator",
    "OutputFiles",
    "ReportOptions",
    "RequestColumns",
    "RequestOutcome",
    "Settings",
    "Target",
    "Words",
    "check_lengths",
    "drawn",
    "measure",
    "prefixed",
    "render",
    "replayed",
    "summary",
    "timeline",
]  # fmt: skip
