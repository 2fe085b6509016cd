"""Three ways to run one per-rank function.

A per-rank function takes and returns the part of each array that its rank holds and talks to other ranks
through named axes. A `PartitionSpec` for each argument and result says how the parts make up whole arrays;
callers of a runner only ever hold whole arrays:

    runner.jit(fn, in_specs, out_specs)(*whole arrays) -> whole arrays

`Devices` runs one rank on each device of a mesh, `Lanes` runs all ranks as vmapped lanes of one device,
`Abstract` traces and lowers without devices. The values are the same.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, cast, runtime_checkable

import jax
import numpy as np
from jax.sharding import AbstractMesh, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from cmx_jax.errors import CmxError
from cmx_jax.mesh.groups import Axes
from cmx_jax.mesh.host import MAX_COLLECTIVE_CPU_DEVICES, host_devices
from cmx_jax.mesh.jax_versions import auto_mesh

_ALIGNMENT = 64  # bytes: what XLA:CPU asks of a buffer
Part = Callable[[tuple[slice, ...]], np.ndarray]


@runtime_checkable
class Runner(Protocol):
    """What every runner does."""

    @property
    def axes(self) -> Axes: ...

    def jit(
        self,
        fn: Callable[..., Any],
        in_specs: Any,
        out_specs: Any,
        donate_argnums: Sequence[int] = (),
        auto: bool = False,
    ) -> Any:
        """The jitted whole-array function of a per-rank function.

        Args:
          fn: the per-rank function.
          in_specs: a tuple with one spec, or pytree (prefix) of specs, for each argument.
          out_specs: the same for the result.
          donate_argnums: arguments whose memory the result may take.
          auto: `fn` is of whole arrays instead, laid out by the specs, and the compiler splits it (GSPMD).
        """
        ...

    def put(self, tree: Any, specs: Any) -> Any:
        """Places whole arrays where `jit` wants them."""
        ...

    def make(self, shape: tuple[int, ...], dtype: Any, spec: P, part: Part) -> Any:
        """A whole array of which each rank's part is asked for by itself.

        Args:
          shape: of the whole array.
          dtype: of it.
          spec: how it is split.
          part: gives the NumPy array at an index of slices; asked once for each different part of this
            process.
        """
        ...


def _is_spec(x: Any) -> bool:
    return isinstance(x, P)


def _each(fn: Callable[[P, Any], Any], specs: Any, tree: Any) -> Any:
    """Applies `fn(spec, leaf)` to each leaf, `specs` being a prefix of `tree`."""
    return jax.tree.map(
        lambda spec, branch: jax.tree.map(lambda leaf: fn(spec, leaf), branch), specs, tree, is_leaf=_is_spec
    )


def _aligned(array: np.ndarray) -> np.ndarray:
    """The array at an address that XLA takes as it is: all CPU devices that hold it then share its memory,
    instead of each having a copy that no cache of the processor holds when its turn comes."""
    room = np.empty(array.nbytes + _ALIGNMENT, np.uint8)
    start = -room.ctypes.data % _ALIGNMENT
    copy = room[start : start + array.nbytes].view(array.dtype).reshape(array.shape)
    copy[...] = array
    return copy


def _sharded(
    mesh: Mesh | AbstractMesh,
    fn: Callable[..., Any],
    in_specs: Any,
    out_specs: Any,
    donate: Sequence[int],
    auto: bool,
) -> Any:
    if auto:
        outs = jax.tree.map(lambda spec: NamedSharding(mesh, spec), out_specs, is_leaf=_is_spec)
        return jax.jit(fn, out_shardings=outs, donate_argnums=donate)  # arguments lie where `put` put them
    mapped = jax.shard_map(fn, mesh=mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False)
    return jax.jit(mapped, donate_argnums=donate)


def _refuse_wide(size: int) -> None:
    if size > MAX_COLLECTIVE_CPU_DEVICES:
        raise CmxError(
            f"a program over {size} CPU devices would deadlock: XLA:CPU has at most "
            f"{MAX_COLLECTIVE_CPU_DEVICES} threads for devices that wait in a collective. Use "
            f"{MAX_COLLECTIVE_CPU_DEVICES} ranks or fewer, or runner 'lanes' for any number"
        )


@dataclass(frozen=True)
class Devices:
    """`shard_map` over a mesh of real devices: real collectives, real sharded buffers."""

    mesh: Mesh

    def __post_init__(self) -> None:
        if self.mesh.devices.flat[0].platform == "cpu":
            _refuse_wide(self.mesh.size)

    @property
    def axes(self) -> Axes:
        return tuple(self.mesh.shape.items())

    def jit(
        self,
        fn: Callable[..., Any],
        in_specs: Any,
        out_specs: Any,
        donate_argnums: Sequence[int] = (),
        auto: bool = False,
    ) -> Any:
        return _sharded(self.mesh, fn, in_specs, out_specs, donate_argnums, auto)

    def put(self, tree: Any, specs: Any) -> Any:
        shardings = _each(lambda spec, _: NamedSharding(self.mesh, spec), specs, tree)
        return jax.device_put(tree, shardings)

    def make(self, shape: tuple[int, ...], dtype: Any, spec: P, part: Part) -> Any:
        sharding, parts = NamedSharding(self.mesh, spec), {}

        def once(index: Any) -> np.ndarray:  # ranks that hold the same part share one reading of it
            key = tuple((s.start, s.stop) for s in index)
            if key not in parts:
                parts[key] = _aligned(part(index).astype(dtype, copy=False))
            return parts[key]

        return jax.make_array_from_callback(shape, sharding, once, dtype=dtype)


@dataclass(frozen=True)
class Lanes:
    """Ranks as vmapped lanes of one device: any number of them, on a laptop."""

    axes: Axes

    def jit(
        self,
        fn: Callable[..., Any],
        in_specs: Any,
        out_specs: Any,
        donate_argnums: Sequence[int] = (),
        auto: bool = False,
    ) -> Any:
        if auto:
            return jax.jit(fn, donate_argnums=donate_argnums)

        def program(*args: Any) -> Any:
            labels = _each(lambda spec, leaf: _Labels(_labels(spec, leaf.ndim)), in_specs, args)
            split = jax.tree.map(self._split, args, labels)
            out_labels = jax.tree.map(lambda spec: _Labels(_spec_labels(spec)), out_specs, is_leaf=_is_spec)
            run = self._nest(fn, labels, out_labels)
            return jax.tree.map(
                lambda label, branch: jax.tree.map(lambda leaf: self._merge(leaf, label), branch),
                out_labels,
                run(*split),
            )

        return jax.jit(program, donate_argnums=donate_argnums)

    def put(self, tree: Any, specs: Any) -> Any:
        del specs  # lanes are axes of whole arrays on one device
        return jax.device_put(tree, host_devices(1)[0])

    def make(self, shape: tuple[int, ...], dtype: Any, spec: P, part: Part) -> Any:
        whole = part(tuple(slice(0, n) for n in shape))
        return self.put(whole.astype(dtype, copy=False), spec)

    def _split(self, leaf: Any, labels: "_Labels") -> Any:
        """Cuts each sharded dimension into (mesh axes..., rest)."""
        shape: list[int] = []
        dims = iter(leaf.shape)
        sizes, group = dict(self.axes), []
        for name in labels.names:
            if name is not None:
                group.append(sizes[name])
                continue
            dim, parts = next(dims), math.prod(group)
            if dim % parts:
                raise CmxError(f"an axis of {dim} does not divide over {parts} ranks")
            shape += [*group, dim // parts]
            group = []
        return leaf.reshape(shape)

    def _merge(self, leaf: Any, labels: "_Labels") -> Any:
        """Undoes `_split`; of an axis that the spec does not name (equal on all ranks) takes the first."""
        leaf = leaf[(0,) * (len(self.axes) - len([n for n in labels.names if n]))]
        names = labels.names
        shape, group = [], 1
        for name, dim in zip([*names, *[None] * (leaf.ndim - len(names))], leaf.shape, strict=True):
            if name is not None:
                group *= dim
                continue
            shape.append(group * dim)
            group = 1
        return leaf.reshape(shape)

    def _full(self, labels: "_Labels") -> list[str | None]:
        return [*(a for a, _ in self.axes if a not in labels.names), *labels.names]

    def _nest(self, fn: Callable[..., Any], labels: Any, out_labels: Any) -> Callable[..., Any]:
        """One vmap for each mesh axis, outermost first, every array mapped where the axis lies in it."""

        def position(names: list[str | None], axis: int) -> int | None:
            name = self.axes[axis][0]
            outer = {n for n, _ in self.axes[:axis]}
            rest = [n for n in names if n not in outer]
            return rest.index(name) if name in rest else None

        for axis in reversed(range(len(self.axes))):
            in_axes = jax.tree.map(lambda label, i=axis: _None(position(list(label.names), i)), labels)
            fn = jax.vmap(
                fn,
                in_axes=jax.tree.map(lambda at: at.value, in_axes),
                out_axes=jax.tree.map(lambda label, i=axis: position(self._full(label), i), out_labels),
                axis_name=self.axes[axis][0],
                axis_size=self.axes[axis][1],
            )
        return fn


@dataclass(frozen=True)
class _Labels:
    """The mesh axis of each dimension behind `_split`; None ends a dimension of the array. A pytree leaf."""

    names: tuple[str | None, ...]


@dataclass(frozen=True)
class _None:
    """Keeps a None from vanishing in a pytree."""

    value: int | None


def _spec_labels(spec: P) -> tuple[str | None, ...]:
    names: list[str | None] = []
    for entry in spec:
        names += [*((entry,) if isinstance(entry, str) else entry or ()), None]
    return tuple(names)


def _labels(spec: P, ndim: int) -> tuple[str | None, ...]:
    return _spec_labels(spec) + (None,) * (ndim - len(spec))


@dataclass(frozen=True)
class Abstract:
    """Trace and lower over an `AbstractMesh`: no devices, no weights, any size.

    Given a mesh of devices, of a topology that nobody needs to have, programs may be compiled for it.

    What `jit` returns is traced with `jax.ShapeDtypeStruct`s, such as `put` gives, and lowered for a named
    platform: `.trace(...).lower(lowering_platforms=("cpu",))`.
    """

    axes: Axes
    mesh: Any = field(default=None, compare=False)  # Mesh or AbstractMesh

    def __post_init__(self) -> None:
        object.__setattr__(self, "mesh", self.mesh or auto_mesh(self.axes))

    def jit(
        self,
        fn: Callable[..., Any],
        in_specs: Any,
        out_specs: Any,
        donate_argnums: Sequence[int] = (),
        auto: bool = False,
    ) -> Any:
        return _sharded(self.mesh, fn, in_specs, out_specs, donate_argnums, auto)

    def put(self, tree: Any, specs: Any) -> Any:
        return shaped(self.mesh, tree, specs)

    def make(self, shape: tuple[int, ...], dtype: Any, spec: P, part: Part | None = None) -> Any:
        del part  # nothing is read
        return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(self.mesh, spec))


def shaped(mesh: Mesh | AbstractMesh, tree: Any, specs: Any) -> Any:
    """Shapes for tracing, placed on a mesh."""

    def place(spec: P, leaf: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=NamedSharding(mesh, spec))

    return _each(place, specs, tree)


RUNNERS = ("devices", "lanes")


def make_runner(kind: str, axes: Axes, first_device: int = 0) -> Runner:
    """The runner of that name over `axes`; `devices` takes the devices from `first_device` on.

    Raises:
      CmxError: the name is unknown, the devices are too few, or the program would deadlock.
    """
    if kind == "lanes":
        return Lanes(axes)
    if kind != "devices":
        raise CmxError(f"runner {kind!r} is unknown, expected one of {list(RUNNERS)}")
    count = math.prod(size for _, size in axes)
    if count > MAX_COLLECTIVE_CPU_DEVICES and len(jax.devices()) < count:
        _refuse_wide(count)  # before so many are made
    devices = host_devices(first_device + count)[first_device : first_device + count]
    return Devices(cast(Mesh, auto_mesh(axes, devices)))


def check_ragged(method: str, runner: Runner) -> None:
    """Refuses the ragged exchange where XLA has no ragged all-to-all: on CPU, and between lanes.

    It is traced and lowered everywhere, and compiled ahead of time for accelerators.

    Raises:
      CmxError: the runner cannot run it.
    """
    if method != "ragged" or isinstance(runner, Abstract):
        return
    if isinstance(runner, Devices) and runner.mesh.devices.flat[0].platform != "cpu":
        return
    where = "on CPU" if isinstance(runner, Devices) else "between lanes"
    raise CmxError(
        f"exchange 'ragged' does not run {where}: XLA's ragged all-to-all is for accelerators. Choose flat, "
        "hierarchical or allgather, or runner 'devices' on accelerators"
    )
