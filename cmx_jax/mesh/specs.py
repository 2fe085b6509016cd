"""Pytrees of `PartitionSpec`s, and the parts of arrays that they name."""

from collections.abc import Callable, Collection
from typing import Any

import jax
import numpy as np
from jax.sharding import PartitionSpec as P

Part = Callable[[tuple[slice, ...]], np.ndarray]
"""Returns the part of a whole array at an index of slices."""


def is_spec(x: Any) -> bool:
    """Returns whether `x` is a spec, as a leaf test for `jax.tree.map`."""
    return isinstance(x, P)


def map_specs(fn: Callable[[P, Any], Any], specs: Any, tree: Any) -> Any:
    """Applies `fn(spec, leaf)` to each leaf, `specs` being a prefix of `tree`."""
    return jax.tree.map(
        lambda spec, branch: jax.tree.map(lambda leaf: fn(spec, leaf), branch), specs, tree, is_leaf=is_spec
    )


def entry_axes(entry: Any) -> tuple[str, ...]:
    """Returns the mesh axes over which a spec's entry splits a dimension: none, one or several."""
    return (entry,) if isinstance(entry, str) else tuple(entry or ())


def only_axes(specs: Any, names: Collection[str]) -> Any:
    """Returns specs with these mesh axes alone: the rest of each dimension counts as one part."""

    def kept(entry: Any) -> Any:
        group = tuple(name for name in entry_axes(entry) if name in names)
        return group[0] if len(group) == 1 else group or None

    return jax.tree.map(lambda spec: P(*map(kept, spec)), specs, is_leaf=is_spec)
