"""Runs the ranks of a program as vmapped lanes of one device."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
from jax.sharding import PartitionSpec as P

from cmx_jax.errors import CmxError
from cmx_jax.mesh.groups import Axes
from cmx_jax.mesh.host import host_devices
from cmx_jax.mesh.specs import Part, entry_axes, is_spec, map_specs


@dataclass(frozen=True)
class Lanes:
    """Runner with ranks as vmapped lanes of one device: any number of them, on a laptop.

    See `cmx_jax.mesh.runners.Runner` for the methods.

    Attributes:
      axes: Name and size of each mesh axis, outermost first.

    Example:
      >>> import jax, numpy as np
      >>> from jax.sharding import PartitionSpec as P
      >>> runner = Lanes((("ep", 4),))
      >>> total = runner.jit(lambda x: jax.lax.psum(x, "ep"), (P("ep"),), P())
      >>> float(total(runner.put(np.arange(4, dtype="float32"), P("ep")))[0])
      6.0
    """

    axes: Axes

    def jit(
        self,
        fn: Callable[..., Any],
        in_specs: Any,
        out_specs: Any,
        donate_argnums: Sequence[int] = (),
        auto: bool = False,
    ) -> Any:
        program = fn if auto else vmapped(fn, self.axes, in_specs, out_specs)
        return jax.jit(program, donate_argnums=donate_argnums)

    def put(self, tree: Any, specs: Any) -> Any:
        del specs  # lanes are axes of whole arrays on one device
        return jax.device_put(tree, host_devices(1)[0])

    def make(self, shape: tuple[int, ...], dtype: Any, spec: P, part: Part) -> Any:
        array = part(tuple(slice(0, n) for n in shape))
        return self.put(array.astype(dtype, copy=False), spec)


def vmapped(fn: Callable[..., Any], axes: Axes, in_specs: Any, out_specs: Any) -> Callable[..., Any]:
    """Returns the whole-array function of a per-rank function whose ranks are vmapped lanes.

    The function may itself run inside a `shard_map`: arrays are then whole with respect to `axes` only.

    Args:
      fn: Per-rank function.
      axes: Name and size of each axis of lanes, outermost first.
      in_specs: Tuple with one spec, or pytree (prefix) of specs, for each argument.
      out_specs: Spec, or pytree (prefix) of specs, of the result. Of a result that does not name an axis, and
        so is equal along it, the first lane's is returned.
    """

    def program(*args: Any) -> Any:
        labels = map_specs(lambda spec, leaf: _Labels(_array_labels(spec, leaf.ndim)), in_specs, args)
        split = jax.tree.map(lambda leaf, label: _split(leaf, label, axes), args, labels)
        out_labels = jax.tree.map(lambda spec: _Labels(_spec_labels(spec)), out_specs, is_leaf=is_spec)
        run = _nest(fn, axes, labels, out_labels)
        return jax.tree.map(
            lambda label, branch: jax.tree.map(lambda leaf: _merge(leaf, label, axes), branch),
            out_labels,
            run(*split),
        )

    return program


def _split(leaf: Any, labels: "_Labels", axes: Axes) -> Any:
    """Cuts each sharded dimension into (mesh axes..., rest)."""
    shape: list[int] = []
    dims = iter(leaf.shape)
    sizes, group = dict(axes), []
    for name in labels.names:
        if name is not None:
            group.append(sizes[name])
            continue
        dim, parts = next(dims), math.prod(group)
        if dim % parts:
            raise CmxError(f"an array dimension of {dim} does not divide over {parts} ranks")
        shape += [*group, dim // parts]
        group = []
    return leaf.reshape(shape)


def _merge(leaf: Any, labels: "_Labels", axes: Axes) -> Any:
    """Undoes `_split`. Along an axis that the spec does not name (equal on all ranks) takes the first."""
    leaf = leaf[(0,) * (len(axes) - len([n for n in labels.names if n]))]
    names = labels.names
    shape, group = [], 1
    for name, dim in zip([*names, *[None] * (leaf.ndim - len(names))], leaf.shape, strict=True):
        if name is not None:
            group *= dim
            continue
        shape.append(group * dim)
        group = 1
    return leaf.reshape(shape)


def _full(labels: "_Labels", axes: Axes) -> list[str | None]:
    """Labels of a result: first the mesh axes that its spec does not name."""
    return [*(a for a, _ in axes if a not in labels.names), *labels.names]


def _nest(fn: Callable[..., Any], axes: Axes, labels: Any, out_labels: Any) -> Callable[..., Any]:
    """Wraps `fn` in one vmap for each mesh axis, outermost first.

    Every array is mapped over the dimension that is the mesh axis, if it has one.
    """

    def position(names: list[str | None], axis: int) -> int | None:
        name = axes[axis][0]
        outer = {n for n, _ in axes[:axis]}
        inner = [n for n in names if n not in outer]
        return inner.index(name) if name in inner else None

    for axis in reversed(range(len(axes))):
        in_axes = jax.tree.map(lambda label, i=axis: _Dim(position(list(label.names), i)), labels)
        fn = jax.vmap(
            fn,
            in_axes=jax.tree.map(lambda dim: dim.value, in_axes),
            out_axes=jax.tree.map(lambda label, i=axis: position(_full(label, axes), i), out_labels),
            axis_name=axes[axis][0],
            axis_size=axes[axis][1],
        )
    return fn


@dataclass(frozen=True)
class _Labels:
    """Labels of the dimensions of an array after `_split`, as one leaf of a pytree.

    Attributes:
      names: Mesh axis of each dimension; None for the rest of a dimension, after its mesh axes.
    """

    names: tuple[str | None, ...]


@dataclass(frozen=True)
class _Dim:
    """Dimension that a vmap maps over, or None, as a leaf: a bare None would vanish in a pytree."""

    value: int | None


def _spec_labels(spec: P) -> tuple[str | None, ...]:
    names: list[str | None] = []
    for entry in spec:
        names += [*entry_axes(entry), None]
    return tuple(names)


def _array_labels(spec: P, ndim: int) -> tuple[str | None, ...]:
    return _spec_labels(spec) + (None,) * (ndim - len(spec))
