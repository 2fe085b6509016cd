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
from cmx_jax.mesh.specs import Part, is_spec, map_specs


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
        if auto:
            return jax.jit(fn, donate_argnums=donate_argnums)

        def program(*args: Any) -> Any:
            labels = map_specs(lambda spec, leaf: _Labels(_array_labels(spec, leaf.ndim)), in_specs, args)
            split = jax.tree.map(self._split, args, labels)
            out_labels = jax.tree.map(lambda spec: _Labels(_spec_labels(spec)), out_specs, is_leaf=is_spec)
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
        array = part(tuple(slice(0, n) for n in shape))
        return self.put(array.astype(dtype, copy=False), spec)

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
        """Undoes `_split`. Along an axis that the spec does not name (equal on all ranks) takes the first."""
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
        """Labels of a result: first the mesh axes that its spec does not name."""
        return [*(a for a, _ in self.axes if a not in labels.names), *labels.names]

    def _nest(self, fn: Callable[..., Any], labels: Any, out_labels: Any) -> Callable[..., Any]:
        """Wraps `fn` in one vmap for each mesh axis, outermost first.

        Every array is mapped over the dimension that is the mesh axis, if it has one.
        """

        def position(names: list[str | None], axis: int) -> int | None:
            name = self.axes[axis][0]
            outer = {n for n, _ in self.axes[:axis]}
            inner = [n for n in names if n not in outer]
            return inner.index(name) if name in inner else None

        for axis in reversed(range(len(self.axes))):
            in_axes = jax.tree.map(lambda label, i=axis: _Dim(position(list(label.names), i)), labels)
            fn = jax.vmap(
                fn,
                in_axes=jax.tree.map(lambda dim: dim.value, in_axes),
                out_axes=jax.tree.map(lambda label, i=axis: position(self._full(label), i), out_labels),
                axis_name=self.axes[axis][0],
                axis_size=self.axes[axis][1],
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
        names += [*((entry,) if isinstance(entry, str) else entry or ()), None]
    return tuple(names)


def _array_labels(spec: P, ndim: int) -> tuple[str | None, ...]:
    return _spec_labels(spec) + (None,) * (ndim - len(spec))
