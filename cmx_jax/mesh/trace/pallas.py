"""Pallas kernels in a jaxpr: how often a kernel's body runs, and copies to other devices within it."""

import math
from typing import Any

import jax


def grid_steps(eqn: Any) -> int | None:
    """Returns how often a `pallas_call` runs its body, once a point of the grid; None if data decide."""
    grid = eqn.params["grid_mapping"].grid
    return math.prod(grid) if all(isinstance(size, int) for size in grid) else None


def remote_copy(eqn: Any) -> tuple[str, tuple[int, ...]] | None:
    """Returns the type and shape of what a `dma_start` sends to another device; None for a local copy."""
    source, *_, device = jax.tree.unflatten(eqn.params["tree"], eqn.invars)
    if device is None:
        return None
    ref = getattr(source, "ref", source)
    parts = [t for t in getattr(source, "transforms", ()) if hasattr(t, "get_indexer_shape")]
    return str(ref.aval.dtype), tuple(parts[-1].get_indexer_shape() if parts else ref.aval.shape)
