"""Serving in virtual time: the real scheduler, with step times from a model instead of a device."""

from cmx_jax.analysis.simulate.predicted import Predicted
from cmx_jax.analysis.simulate.simulated_deployment import InstancePool, SimulatedDeployment
from cmx_jax.analysis.simulate.simulation_metrics import SimulationSummary, render, summary
from cmx_jax.analysis.simulate.supernodes import SimulationOutcome, simulate
from cmx_jax.analysis.simulate.times import Linear, StepTimes
from cmx_jax.analysis.simulate.workload import Arrival, mooncake, synthetic

__all__ = [
    "Arrival",
    "InstancePool",
    "Linear",
    "Predicted",
    "SimulatedDeployment",
    "SimulationOutcome",
    "SimulationSummary",
    "StepTimes",
    "mooncake",
    "render",
    "simulate",
    "summary",
    "synthetic",
]  # fmt: skip
