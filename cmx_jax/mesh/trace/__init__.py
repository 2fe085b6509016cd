"""Reads what a program moves and computes from the program itself: its jaxpr, StableHLO or optimised HLO."""

from cmx_jax.mesh.trace.differences import differences
from cmx_jax.mesh.trace.hlo.reader import read_hlo
from cmx_jax.mesh.trace.jaxpr import read_jaxpr
from cmx_jax.mesh.trace.ops.collective import Collective
from cmx_jax.mesh.trace.program import SOURCES, trace
from cmx_jax.mesh.trace.table import Trace, View, render

__all__ = [
    "SOURCES",
    "Collective",
    "Trace",
    "View",
    "differences",
    "read_hlo",
    "read_jaxpr",
    "render",
    "trace",
]
