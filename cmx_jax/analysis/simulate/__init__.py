"""Serving in virtual time: the real scheduler, with steps that take the seconds somebody says they take."""

from cmx_jax.serving.simulate.deployment import Deployment, Pool
from cmx_jax.serving.simulate.predicted import Predicted
from cmx_jax.serving.simulate.report import render, summary
from cmx_jax.serving.simulate.router import simulate
from cmx_jax.serving.simulate.times import Linear, StepTimes
from cmx_jax.serving.simulate.workload import Arrival, mooncake, synthetic

__all__ = [
    "Arrival", "Deployment", "Linear", "Pool", "Predicted", "StepTimes",
    "mooncake", "render", "simulate", "summary", "synthetic",
]  # fmt: skip
