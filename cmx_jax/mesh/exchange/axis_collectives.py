"""Collectives over one or several mesh axes, or none."""

import jax
from jaxtyping import Array

Axis = str | tuple[str, ...]
"""Name of a mesh axis, or names of several, whose ranks are numbered as one line, first axis outermost."""


def axis_names(axis: Axis) -> tuple[str, ...]:
    """Names of the mesh axes as a tuple."""
    return (axis,) if isinstance(axis, str) else axis


def gather(x: Array, axis: Axis, dim: int = 0) -> Array:
    """Concatenates the arrays of all ranks along `dim`.

    Gathers axis by axis, since one gather over several mesh axes does not run as lanes.
    """
    for name in reversed(axis_names(axis)):
        x = jax.lax.all_gather(x, name, axis=dim, tiled=True)
    return x


def psum_if(x: Array, axis: Axis) -> Array:
    """Sums over the ranks of the axes. Returns `x` itself if there are no axes."""
    return jax.lax.psum(x, axis) if axis else x
