"""Histogram, stable sort and rank of small integer keys, such as the ranks or experts of messages.

XLA:CPU is slow at the general forms of these, so each has a cheaper form for few or small keys.

Letters in shapes: `Z` keys, `U` bins.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

FEW = 1 << 14
"""Number of comparisons that cost less than a sort or a histogram on CPU."""


def bincount(keys: Int[Array, " Z"], bins: int) -> Int[Array, " bins"]:
    """Counts how often each key in `[0, bins)` occurs."""
    if keys.shape[0] * bins <= FEW:
        return jnp.sum(keys[:, None] == jnp.arange(bins, dtype=keys.dtype)[None], axis=0, dtype=jnp.int32)
    return jnp.bincount(keys, length=bins).astype(jnp.int32)


def stable_argsort(keys: Int[Array, " Z"], bins: int) -> Int[Array, " Z"]:
    """Returns the stable argsort of keys in `[0, bins)`.

    Where key and index fit one integer, that integer alone is sorted: for a sort with two operands XLA:CPU
    calls a comparison function that it generates, once for each pair.
    """
    rows = keys.shape[0]
    if bins * rows >= 1 << 31:
        return jnp.argsort(keys, stable=True).astype(jnp.int32)
    index = jnp.arange(rows, dtype=jnp.int32)
    return jax.lax.sort(keys.astype(jnp.int32) * rows + index, is_stable=False) % rows


def rank_in_group(keys: Int[Array, " Z"], bins: int) -> tuple[Int[Array, " Z"], Int[Array, " bins"]]:
    """Numbers equal keys in their order.

    Args:
      keys: Keys in `[0, bins)`.
      bins: Number of different keys.

    Returns:
      For each key the number of equal keys before it, and how often each key in `[0, bins)` occurs.
    """
    counts, index = bincount(keys, bins), jnp.arange(keys.shape[0], dtype=jnp.int32)
    if keys.shape[0] ** 2 <= FEW:
        before = (keys[:, None] == keys[None]) & (index[None] < index[:, None])
        return jnp.sum(before, axis=1, dtype=jnp.int32), counts
    order = stable_argsort(keys, bins)
    start = jnp.cumsum(counts) - counts
    sorted_index = jnp.zeros_like(index).at[order].set(index)
    return sorted_index - start[keys], counts
