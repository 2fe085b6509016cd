"""Three ways to run one per-rank function.

A per-rank function takes and returns the part of each array that its rank holds and talks to other ranks
through named axes. A `PartitionSpec` for each argument and result says how the parts make up whole arrays.
Callers of a runner hold whole arrays only:

    runner.jit(fn, in_specs, out_specs)(*whole arrays) -> whole arrays

`Devices` runs ranks on the devices of a mesh, one on each, or several as lanes: a device is then an NPU, and
its lanes are the dies. `Lanes` (lanes.py) runs all ranks as vmapped lanes of one device, `Abstract` traces
and lowers without devices. The values are the same.
"""

import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, cast, runtime_checkable

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from cmx_jax.errors import CmxError
from cmx_jax.mesh.groups import Axes
from cmx_jax.mesh.host import MAX_COLLECTIVE_CPU_DEVICES, host_devices
from cmx_jax.mesh.jax_versions import auto_mesh
from cmx_jax.mesh.lanes import Lanes, vmapped
from cmx_jax.mesh.specs import Part, entry_axes, is_spec, map_specs, only_axes

_ALIGNMENT = 64  # bytes: XLA:CPU requires it of a buffer


@runtime_checkable
class Runner(Protocol):
    """Interface of the runners.

    Example:
      >>> isinstance(make_runner("lanes", (("ep", 4),)), Runner)
      True
    """

    @property
    def axes(self) -> Axes:
        """Name and size of each mesh axis, outermost first."""
        ...

    def jit(
        self,
        fn: Callable[..., Any],
        in_specs: Any,
        out_specs: Any,
        donate_argnums: Sequence[int] = (),
        auto: bool = False,
    ) -> Any:
        """Returns the jitted whole-array function of a per-rank function.

        Args:
          fn: Per-rank function.
          in_specs: Tuple with one spec, or pytree (prefix) of specs, for each argument.
          out_specs: Spec, or pytree (prefix) of specs, of the result.
          donate_argnums: Arguments whose memory the result may take.
          auto: Takes `fn` as a function of whole arrays, laid out by the specs, which the compiler splits
            (GSPMD).
        """
        ...

    def put(self, tree: Any, specs: Any) -> Any:
        """Places whole arrays where `jit` wants them."""
        ...

    def make(self, shape: tuple[int, ...], dtype: Any, spec: P, part: Part) -> Any:
        """Makes a whole array from the parts of the ranks.

        Args:
          shape: Shape of the whole array.
          dtype: Type of the array.
          spec: Spec by which the array is split.
          part: Returns the NumPy array at an index of slices; called once for each different part that this
            process holds.
        """
        ...


def _jit_on_mesh(
    runner: "Devices | Abstract",
    fn: Callable[..., Any],
    in_specs: Any,
    out_specs: Any,
    donate_argnums: Sequence[int] = (),
    auto: bool = False,
) -> Any:
    """Method `jit` of the runners that have a mesh."""
    lanes, axes = runner.lanes, tuple(runner.mesh.shape)
    across_in, across_out = only_axes(in_specs, axes), only_axes(out_specs, axes)
    if auto:
        # arguments lie where `put` placed them
        outs = jax.tree.map(lambda spec: NamedSharding(runner.mesh, spec), across_out, is_leaf=is_spec)
        return jax.jit(fn, out_shardings=outs, donate_argnums=donate_argnums)
    if lanes:
        names = dict(lanes)
        jax.tree.map(lambda spec: _check_lanes(spec, names), (in_specs, out_specs), is_leaf=is_spec)
        fn = vmapped(fn, lanes, only_axes(in_specs, names), only_axes(out_specs, names))
    mapped = jax.shard_map(fn, mesh=runner.mesh, in_specs=across_in, out_specs=across_out, check_vma=False)
    return jax.jit(mapped, donate_argnums=donate_argnums)


@dataclass(frozen=True)
class Devices:
    """Runner that is `shard_map` over a mesh of real devices: real collectives, real sharded buffers.

    Attributes:
      mesh: Devices of the ranks.
      lanes: Name and size of each axis of ranks that share a device, inside the mesh axes. On a device its
        ranks are vmapped lanes, so a collective over `lanes` moves nothing between devices.

    Example:
      >>> import jax, numpy as np
      >>> from jax.sharding import PartitionSpec as P
      >>> runner = make_runner("devices", (("npu", 4), ("die", 2)), ranks_per_device=2)
      >>> runner.mesh.size, runner.axes
      (4, (('npu', 4), ('die', 2)))
      >>> total = runner.jit(lambda x: jax.lax.psum(x, ("npu", "die")), (P(("npu", "die")),), P())
      >>> float(total(runner.put(np.arange(8, dtype="float32"), P(("npu", "die"))))[0])
      28.0
    """

    mesh: Mesh
    lanes: Axes = ()

    jit = _jit_on_mesh

    def __post_init__(self) -> None:
        if self.mesh.devices.flat[0].platform == "cpu":
            _refuse_wide(self.mesh.size)

    @property
    def axes(self) -> Axes:
        return (*self.mesh.shape.items(), *self.lanes)

    def _sharding(self, spec: P) -> NamedSharding:
        """Sharding of an array over the devices; the parts of a device's lanes stay together."""
        return NamedSharding(self.mesh, only_axes(spec, self.mesh.shape))

    def portable(self) -> "Abstract":
        """Returns an equal runner for all `Devices` with the same axes and lanes: they share one trace.

        Its programs run on the devices of their arguments, which must be placed (`put`).
        """
        return Abstract(self.axes, lanes=self.lanes)

    def put(self, tree: Any, specs: Any) -> Any:
        return jax.device_put(tree, map_specs(lambda spec, _: self._sharding(spec), specs, tree))

    def make(self, shape: tuple[int, ...], dtype: Any, spec: P, part: Part) -> Any:
        sharding, parts = self._sharding(spec), {}

        def once(index: Any) -> np.ndarray:  # ranks that hold the same part share one reading of it
            key = tuple((s.start, s.stop) for s in index)
            if key not in parts:
                parts[key] = aligned(part(index).astype(dtype, copy=False))
            return parts[key]

        return jax.make_array_from_callback(shape, sharding, once, dtype=dtype)


@dataclass(frozen=True)
class Abstract:
    """Runner that traces and lowers over an `AbstractMesh`: no devices, no weights, any size.

    The result of `jit` is traced with `jax.ShapeDtypeStruct`s, such as `put` returns, and lowered for a named
    platform: `.trace(...).lower(lowering_platforms=("cpu",))`.

    Attributes:
      axes: Name and size of each mesh axis, outermost first.
      mesh: Mesh or AbstractMesh to trace over; None for an AbstractMesh of `axes`. For a mesh of devices,
        possibly of a topology that is not there, programs can also be compiled.
      lanes: The innermost of `axes`, whose ranks share a device; see `Devices`. They are not in the mesh.

    Example:
      >>> import jax
      >>> from jax.sharding import PartitionSpec as P
      >>> runner = Abstract((("ep", 320),))
      >>> total = runner.jit(lambda x: jax.lax.psum(x, "ep"), (P("ep"),), P())
      >>> x = runner.put(jax.ShapeDtypeStruct((320, 4), "float32"), P("ep"))
      >>> total.eval_shape(x).shape
      (1, 4)
    """

    axes: Axes
    mesh: Any = field(default=None, compare=False)
    lanes: Axes = ()

    jit = _jit_on_mesh

    def __post_init__(self) -> None:
        across = self.axes[: len(self.axes) - len(self.lanes)]
        object.__setattr__(self, "mesh", self.mesh or auto_mesh(across))

    def put(self, tree: Any, specs: Any) -> Any:
        return map_specs(lambda spec, leaf: self.make(leaf.shape, leaf.dtype, spec), specs, tree)

    def make(self, shape: tuple[int, ...], dtype: Any, spec: P, part: Part | None = None) -> Any:
        del part  # nothing is read
        sharding = NamedSharding(self.mesh, only_axes(spec, self.mesh.shape))
        return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)


def _check_lanes(spec: P, lanes: Collection[str]) -> None:
    """Refuses a dimension that is split over lanes first: the parts of a device would not lie together.

    Raises:
      CmxError: A dimension names an axis of lanes before one of devices.
    """
    for entry in spec:
        are_lanes = [name in lanes for name in entry_axes(entry)]
        if are_lanes != sorted(are_lanes):
            raise CmxError(f"{spec}: {entry} has lanes before devices, expected the axes {list(lanes)} last")


def aligned(array: np.ndarray) -> np.ndarray:
    """Returns an array at an address that XLA takes as it is: the array itself, or a copy.

    All CPU devices that hold the array then share its memory. Otherwise each would have a copy of its own,
    which is in no cache of the processor when the device's turn comes.
    """
    if array.ctypes.data % _ALIGNMENT == 0 and array.flags.c_contiguous:
        return array
    buffer = np.empty(array.nbytes + _ALIGNMENT, np.uint8)
    start = -buffer.ctypes.data % _ALIGNMENT
    copy = buffer[start : start + array.nbytes].view(array.dtype).reshape(array.shape)
    copy[...] = array
    return copy


def _refuse_wide(size: int) -> None:
    if size > MAX_COLLECTIVE_CPU_DEVICES:
        raise CmxError(
            f"a program over {size} CPU devices would deadlock: XLA:CPU has at most "
            f"{MAX_COLLECTIVE_CPU_DEVICES} threads for devices that wait in a collective. Use "
            f"{MAX_COLLECTIVE_CPU_DEVICES} devices or fewer, several ranks per device, or runner 'lanes'"
        )


RUNNERS = ("devices", "lanes")


def make_runner(kind: str, axes: Axes, first_device: int = 0, ranks_per_device: int = 1) -> Runner:
    """Makes a runner over mesh axes.

    Args:
      kind: Name of the runner, one of `RUNNERS`.
      axes: Name and size of each mesh axis, outermost first.
      first_device: Number of the first device that runner `devices` takes.
      ranks_per_device: Number of ranks that share a device of runner `devices`, as the dies of an NPU do: the
        innermost axes, whose sizes multiply to it, are lanes.

    Raises:
      CmxError: The name is unknown, there are too few devices, the program would deadlock, or no innermost
        axes have `ranks_per_device` ranks.

    Example:
      >>> make_runner("lanes", (("node", 2), ("npu", 8))).axes
      (('node', 2), ('npu', 8))
    """
    if kind == "lanes":
        return Lanes(axes)
    if kind != "devices":
        raise CmxError(f"runner {kind!r} is unknown, expected one of {list(RUNNERS)}")
    across, lanes = _split_axes(axes, ranks_per_device)
    count = math.prod(size for _, size in across)
    if count > MAX_COLLECTIVE_CPU_DEVICES and len(jax.devices()) < count:
        _refuse_wide(count)  # before so many are made
    devices = host_devices(first_device + count)[first_device : first_device + count]
    return Devices(cast(Mesh, auto_mesh(across, devices)), lanes)


def _split_axes(axes: Axes, ranks_per_device: int) -> tuple[Axes, Axes]:
    """Splits axes into those across devices and those of the ranks of one device."""
    cut = len(axes)
    while cut and math.prod(size for _, size in axes[cut:]) < ranks_per_device:
        cut -= 1
    if math.prod(size for _, size in axes[cut:]) != ranks_per_device:
        raise CmxError(
            f"{ranks_per_device} ranks per device, expected the size of the innermost axes: of {dict(axes)} "
            f"that is {' or '.join(str(math.prod(s for _, s in axes[i:])) for i in range(len(axes), -1, -1))}"
        )
    return axes[:cut], axes[cut:]
