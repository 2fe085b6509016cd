"""Arrays whose elements say from which rank and position they come: what goes astray shows."""

import math
from typing import Any

import jax.numpy as jnp
import numpy as np

from cmx_jax.errors import CmxError


def rank_coded(ranks: int, shape: tuple[int, ...], dtype: Any = np.float32) -> np.ndarray:
    """The whole array `[ranks * shape[0], *shape[1:]]` of which each rank holds `shape`.

    The element at `position` (row-major) of a rank's part is `1 + rank * size + position`: all differ, and
    none is zero. `where_from` reads them.

    Args:
      ranks: that hold a part each, in the order of the array's first axis.
      shape: of one rank's part.
      dtype: of the array.

    Raises:
      CmxError: the type cannot hold so many whole numbers exactly.
    """
    total, dtype = ranks * math.prod(shape), jnp.dtype(dtype)
    exact = 2 ** (jnp.finfo(dtype).nmant + 1) if jnp.issubdtype(dtype, jnp.floating) else jnp.iinfo(dtype).max
    if total > exact:
        raise CmxError(
            f"{ranks} ranks of {shape} are {total} elements, {dtype} tells whole numbers up to {exact} "
            "apart: take fewer elements or a wider type"
        )
    return np.arange(1, total + 1).reshape(ranks * shape[0], *shape[1:]).astype(dtype)


def where_from(coded: Any, shape: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    """The rank, and the position in its part, of each element of what `rank_coded(ranks, shape)` made.

    Args:
      coded: elements of it, in any order and shape.
      shape: of one rank's part.

    Returns:
      Two int64 arrays of the shape of `coded`; an element that is zero comes from rank -1.
    """
    rank, position = np.divmod(np.asarray(coded).astype(np.int64) - 1, math.prod(shape))
    return rank, position
