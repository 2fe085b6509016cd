"""Bytes of arrays. Types narrower than a byte are packed, as XLA packs them."""

import math
from collections.abc import Sequence
from functools import cache

import jax.numpy as jnp


def array_bytes(shape: Sequence[int], dtype: str) -> int:
    """Returns the bytes of an array; `dtype` is its type by NumPy's name.

    Example:
      >>> array_bytes((256,), "int4"), array_bytes((3, 4), "bfloat16")
      (128, 24)
    """
    return -(-math.prod(shape) * bits_of(dtype) // 8)


@cache
def bits_of(dtype: str) -> int:
    """Returns the number of bits of an element."""
    kind = jnp.dtype(dtype)
    if jnp.issubdtype(kind, jnp.integer):
        return int(jnp.iinfo(kind).bits)
    if jnp.issubdtype(kind, jnp.floating):
        return int(jnp.finfo(kind).bits)
    return 8 * kind.itemsize
