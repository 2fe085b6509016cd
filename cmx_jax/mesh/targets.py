"""Targets that a program can be compiled for: this machine's CPU devices, or TPU topologies, without TPUs."""

import importlib.util
import os

import jax
from jax.experimental import topologies

from cmx_jax.errors import CmxError
from cmx_jax.mesh.host import request_devices

TPU_OPTIONS = {"xla_tpu_enable_async_all_to_all": "true"}
"""Compiler options for TPUs. By default nothing runs concurrently with an all-to-all."""


def compiler_options(target: str) -> dict[str, str]:
    """Compiler options for a target."""
    return {} if target == "cpu" else TPU_OPTIONS


def target_devices(target: str, count: int) -> list[jax.Device]:
    """Returns the first devices of a target.

    Args:
      target: `cpu`, or the name of a TPU topology, such as v5p:4x4x10 (160 chips), v5p:8x8x6 (384) or
        tpu7x:4x8x12 (768 cores).
      count: Number of devices.

    Raises:
      CmxError: The topology is unknown or too small, or its compiler is missing.
    """
    if target == "cpu":
        request_devices(count)
        return list(jax.devices("cpu")[:count])
    if importlib.util.find_spec("libtpu") is None:
        raise CmxError(f"target {target}: the TPU compiler is missing: pip install 'cmx_jax[tpu-aot]'")
    # libtpu asks where it runs unless these variables say it
    for name, value in (("TPU_ACCELERATOR_TYPE", "v5p-8"), ("TPU_WORKER_HOSTNAMES", "localhost")):
        os.environ.setdefault(name, value)
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    try:
        devices = list(topologies.get_topology_desc(target, "tpu").devices)
    except Exception as error:  # the compiler raises several types
        reason = str(error).splitlines()[0]
        raise CmxError(f"target {target!r} is neither cpu nor a TPU topology: {reason}") from None
    if len(devices) < count:
        raise CmxError(f"target {target} has {len(devices)} devices, {count} are needed")
    return devices[:count]
