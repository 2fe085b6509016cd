"""Groups of devices that take part in a collective with each other."""

import math
from collections.abc import Mapping, Sequence

import numpy as np

Axes = tuple[tuple[str, int], ...]
"""Name and size of each axis of a mesh, outermost first."""
Groups = tuple[tuple[int, ...], ...]
"""Device numbers of each group."""


def mesh_groups(
    sizes: Mapping[str, int], parts: Sequence[tuple[str, int, int]], devices: np.ndarray | None = None
) -> Groups:
    """Returns the groups of devices that axes of a mesh make.

    Args:
      sizes: Size of each mesh axis, outermost first.
      parts: Axes, or parts of axes, that a group runs over, each as `(name, before, size)`: the axis is cut
        into `(before, size, rest)` and the group runs over the middle. A whole axis is `(name, 1, its size)`.
      devices: Device numbers, row by row; None for 0, 1, 2 and so on.
    """
    cuts: dict[str, list[tuple[int, int]]] = {name: [] for name in sizes}
    for name, before, size in parts:
        cuts[name].append((before, size))
    shape, inside = [], []
    for name, axis_size in sizes.items():
        done = 1
        for before, size in sorted(cuts[name]):
            shape += [before // done, size]
            inside.append(len(shape) - 1)
            done = before * size
        shape.append(axis_size // done)
    numbers = np.arange(math.prod(sizes.values())) if devices is None else devices
    last = tuple(range(len(shape) - len(inside), len(shape)))
    width = math.prod(shape[axis] for axis in inside)
    rows = np.moveaxis(numbers.reshape(shape), inside, last).reshape(-1, width)
    return tuple(map(tuple, rows.tolist()))
