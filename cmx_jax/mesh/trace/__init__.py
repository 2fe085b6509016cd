"""What a program moves and computes, read from the program itself."""

from cmx_jax.mesh.trace.collective import Collective
from cmx_jax.mesh.trace.hlo import read_hlo
from cmx_jax.mesh.trace.jaxpr import read_jaxpr
from cmx_jax.mesh.trace.table import Trace, render, trace

__all__ = ["Collective", "Trace", "read_hlo", "read_jaxpr", "render", "trace"]
