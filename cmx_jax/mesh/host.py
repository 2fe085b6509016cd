"""Settings that JAX must have before it starts: number of host devices, folder of compiled programs.

This is the only place that sets them. Only `host_devices`, `has_exactly` and `request_exactly` may start the
backend.
"""

import contextlib
import os
import re
from pathlib import Path
from typing import Any

import jax

from cmx_jax.errors import CmxError

MAX_COLLECTIVE_CPU_DEVICES = 256
"""Largest number of CPU devices in one program with collectives.

XLA:CPU blocks one pool thread for each device that waits in a collective, and its pool has at most 256
threads: a wider program waits forever. Wider meshes run on the `lanes` runner or are compiled only."""

_CONFIG: Any = jax.config  # not all versions declare all options
_COUNT_FLAG = "xla_force_host_platform_device_count"
_FLAGS = {
    # a step on 160 devices can outlast the 40 s after which XLA gives up on a loaded machine
    "xla_cpu_collective_call_warn_stuck_timeout_seconds": "300",
    "xla_cpu_collective_call_terminate_timeout_seconds": "1200",
    # devices share the cores: concurrency within one device only costs context switches
    "xla_cpu_enable_concurrency_optimized_scheduler": "false",
}


def request_devices(count: int) -> None:
    """Makes sure that JAX has, or will have, at least `count` CPU devices. Call it before any computation.

    Raises:
      CmxError: JAX has already started with fewer devices, or `XLA_FLAGS` asks for fewer.

    Example:
      >>> request_devices(2)
      >>> import jax
      >>> len(jax.devices("cpu")) >= 2
      True
    """
    flags = os.environ.get("XLA_FLAGS", "")
    for name, value in _FLAGS.items():
        if name not in flags:
            flags += f" --{name}={value}"
    os.environ["XLA_FLAGS"] = flags.strip()
    forced = re.search(rf"{_COUNT_FLAG}=(\d+)", flags)
    if forced:
        if int(forced[1]) < count:
            raise CmxError(
                f"XLA_FLAGS asks for {forced[1]} host devices, {count} are needed: "
                f"increase or remove --{_COUNT_FLAG}"
            )
        return
    if count <= _CONFIG.jax_num_cpu_devices:
        return
    try:
        jax.config.update("jax_num_cpu_devices", count)
    except RuntimeError:  # JAX has started
        have = len(jax.devices("cpu"))
        if have < count:
            raise _started(have, count) from None


def _started(have: int, count: int) -> CmxError:
    return CmxError(
        f"JAX has already started with {have} CPU device(s), {count} are needed: call "
        f"cmx_jax.mesh.request_devices({count}) before the first JAX computation"
    )


def has_exactly(count: int) -> bool:
    """Returns whether JAX has exactly `count` devices, all of them CPU devices.

    Starts JAX only if it is configured for that number.
    """
    forced = re.search(rf"{_COUNT_FLAG}=(\d+)", os.environ.get("XLA_FLAGS", ""))
    configured = _CONFIG.jax_num_cpu_devices
    if configured < 0:
        configured = int(forced[1]) if forced else 1
    return configured == count and [d.platform for d in jax.devices()] == ["cpu"] * count


def request_exactly(count: int) -> None:
    """Starts JAX with exactly `count` CPU devices and no others, whatever was requested before.

    Raises:
      CmxError: JAX has already started with other devices.
    """
    if has_exactly(count):
        return
    flags = os.environ.get("XLA_FLAGS", "")
    os.environ["XLA_FLAGS"] = re.sub(rf"\s*--{_COUNT_FLAG}=\d+", "", flags).strip()
    with contextlib.suppress(RuntimeError, CmxError):  # JAX has started
        jax.config.update("jax_num_cpu_devices", count)
        jax.config.update("jax_platforms", "cpu")
        request_devices(count)
    if not has_exactly(count):
        have = jax.devices()
        raise CmxError(
            f"JAX has already started with {len(have)} {have[0].platform} device(s), exactly {count} CPU "
            "devices are needed: compute nothing before, such as while modules are imported"
        )


def host_devices(count: int) -> list[jax.Device]:
    """Returns at least `count` devices: the accelerators if there are enough, else CPU devices. Starts JAX.

    Raises:
      CmxError: There are too few devices, or `JAX_PLATFORMS` names a platform that is missing.

    Example:
      >>> len(host_devices(2)) >= 2
      True
    """
    request_devices(count)
    try:
        devices = jax.devices()
    except RuntimeError as error:  # JAX_PLATFORMS names a platform that is missing
        platforms = os.environ.get("JAX_PLATFORMS", "")
        raise CmxError(f"JAX finds no devices (JAX_PLATFORMS is {platforms!r}): {error}") from None
    devices = devices if len(devices) >= count else jax.devices("cpu")
    if len(devices) < count:
        raise _started(len(devices), count)
    return devices


def cache_directory() -> Path:
    """Cache folder: `$CMX_CACHE_DIR`, else `cmx_jax` in the user's cache folder."""
    directory = os.environ.get("CMX_CACHE_DIR")
    if directory:
        return Path(directory).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "cmx_jax"


def enable_compilation_cache() -> None:
    """Keeps compiled programs between processes, unless the user has set JAX's own options for it.

    If the folder cannot be written, nothing is kept.

    Example:
      >>> enable_compilation_cache()
    """
    if _CONFIG.jax_compilation_cache_dir is not None or not _CONFIG.jax_enable_compilation_cache:
        return
    folder = cache_directory() / "xla"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:
        return
    if os.access(folder, os.W_OK):
        jax.config.update("jax_compilation_cache_dir", str(folder))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)
