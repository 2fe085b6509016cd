"""The pytest plugin: a marker and fixtures. It imports nothing heavy until a test uses it.

* `@pytest.mark.devices(count, timeout=None)` on a test, class or module: the test sees exactly
  `count` devices, all of them CPU devices, whatever number the run has. See `processes.py`.
* `supernode_mesh(axes, on=None)`: a `jax.sharding.Mesh` over NPUs of the virtual supernode.
* `runner(axes, on=None)`: a runner of a per-rank function; the test runs with each kind of runner.
"""

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import pytest

from cmx_jax.testing.processes import DeviceProcesses

if TYPE_CHECKING:
    from jax.sharding import Mesh

    from cmx_jax.mesh.pools import Slice
    from cmx_jax.mesh.runners import Runner


def pytest_addoption(parser: pytest.Parser) -> None:
    """Adds the option of the ini file."""
    parser.addini(
        "devices_timeout", "seconds that a test in a process with other devices may take", default="300"
    )


def pytest_configure(config: pytest.Config) -> None:
    """Adds the marker, and the plugin that runs marked tests."""
    config.addinivalue_line(
        "markers",
        "devices(count, timeout=None): run with exactly `count` virtual CPU devices, in another process "
        "where this one has others; there it may take `timeout` seconds",
    )
    config.pluginmanager.register(DeviceProcesses(config))


@pytest.fixture
def supernode_mesh() -> "Callable[..., Mesh]":
    """Makes meshes: `supernode_mesh({"node": 2, "npu": 8}, on=carve().prefill[0])`.

    `axes` are names and sizes, outermost first; `on` is a slice of the supernode (`cmx_jax.mesh.carve`),
    without which the mesh has the first NPUs. NPU `i` is the test's device `i`.

    Raises:
      CmxError: The slice or the devices are too few, or more than 256.
    """

    def make(axes: Mapping[str, int], on: "Slice | None" = None) -> "Mesh":
        return _devices(axes, on).mesh

    return make


@pytest.fixture(params=("devices", "lanes", "abstract"))
def runner(request: pytest.FixtureRequest) -> "Callable[..., Runner]":
    """Makes a runner over `axes`, as `supernode_mesh` takes them; the test runs once with each kind.

    `Abstract` computes nothing: its programs are traced and lowered, and have shapes. A test of values uses
    the other two: `@pytest.mark.parametrize("runner", ["devices", "lanes"], indirect=True)`.
    """

    def make(axes: Mapping[str, int], on: "Slice | None" = None) -> "Runner":
        from cmx_jax.mesh import Abstract, Lanes

        if request.param == "devices":
            return _devices(axes, on)
        return (Lanes if request.param == "lanes" else Abstract)(tuple(axes.items()))

    return make


def _devices(axes: Mapping[str, int], on: "Slice | None") -> Any:
    import math

    import jax

    from cmx_jax.errors import CmxError
    from cmx_jax.mesh.runners import make_runner

    size, first, available = math.prod(axes.values()), on.start if on else 0, len(jax.devices())
    if on and size > on.npus:
        raise CmxError(f"a mesh of {dict(axes)} needs {size} NPUs, {on.name} has {on.npus}")
    if first + size > available:
        raise CmxError(
            f"a mesh of {dict(axes)} needs the devices {first} to {first + size - 1}, there are {available}: "
            f"mark the test with @pytest.mark.devices({first + size})"
        )
    return make_runner("devices", tuple(axes.items()), first)
