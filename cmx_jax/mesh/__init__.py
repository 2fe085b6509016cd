"""The machine: supernode, pools, layouts, runners, token exchange."""

from cmx_jax.mesh.host import enable_compilation_cache, host_devices, request_devices
from cmx_jax.mesh.lanes import Lanes
from cmx_jax.mesh.layout import Layout, expert_parallel, tensor_parallel
from cmx_jax.mesh.pools import Pools, carve
from cmx_jax.mesh.runners import Abstract, Devices, Runner, make_runner
from cmx_jax.mesh.supernode import CLOUDMATRIX384, H800_NODE, Supernode

__all__ = [
    "CLOUDMATRIX384",
    "H800_NODE",
    "Abstract",
    "Devices",
    "Lanes",
    "Layout",
    "Pools",
    "Runner",
    "Supernode",
    "carve",
    "enable_compilation_cache",
    "expert_parallel",
    "host_devices",
    "make_runner",
    "request_devices",
    "tensor_parallel",
]
