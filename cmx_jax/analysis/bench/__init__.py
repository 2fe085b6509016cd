"""Load on a server of OpenAI's API, and what its users would see: latencies, throughput, goodput.

Names and numbers are those of vLLM's `benchmark_serving`.
"""

from cmx_jax.analysis.bench.client import Client, Outcome
from cmx_jax.analysis.bench.files import Files
from cmx_jax.analysis.bench.load import Load, measure
from cmx_jax.analysis.bench.plot import timeline
from cmx_jax.analysis.bench.prompts import Ask, Words, check_lengths, drawn, prefixed, replayed
from cmx_jax.analysis.bench.report import Wanted, render, summary
from cmx_jax.analysis.bench.target import Target

__all__ = [
    "Ask", "Client", "Files", "Load", "Outcome", "Target", "Wanted", "Words",
    "check_lengths", "drawn", "measure", "prefixed", "render", "replayed", "summary", "timeline",
]  # fmt: skip
