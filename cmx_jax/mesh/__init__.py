"""The machine: supernode, pools, layouts, runners, token exchange.

supernode.py        machines as data
pools.py            carving of a supernode into instances
layout.py           layouts: the placement of a model on the ranks of an instance; named_layouts.py
placement.py        placement of experts in slots, with DeepSeek's EPLB (eplb.py)
runners.py          three ways to run a per-rank function; lanes.py, specs.py
exchange/           the token exchange: the way of a token from gate to combine
trace/              reads the collectives of programs
host.py             settings that JAX must have before it starts; jax_versions.py, targets.py, groups.py
"""

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
