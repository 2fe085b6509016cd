"""Serving in virtual time: the real scheduler, with steps that take the seconds somebody says they take."""

from cmx_jax.analysis.simulate.deployment import Deployment, Pool
from cmx_jax.analysis.simulate.predicted import Predicted
from cmx_jax.analysis.simulate.report import render, summary
from cmx_jax.analysis.simulate.supernodes import simulate
from cmx_jax.analysis.simulate.times import Linear, StepTimes
from cmx_jax.analysis.simulate.workload import Arrival, mooncake, synthetic

__all__ = [
    "Arrival", "Deployment", "Linear", "Pool", "Predicted", "StepTimes",
    "mooncake", "render", "simulate", "summary", "synthetic",
]  # fmt: skip
