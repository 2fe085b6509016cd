"""Arrays whose elements tell from which rank and position they come, so that misplaced ones are seen."""

import math
from typing import Any

import jax.numpy as jnp
import numpy as np

from cmx_jax.errors import CmxError


def rank_coded(ranks: int, shape: tuple[int, ...], dtype: Any = np.float32) -> np.ndarray:
    """Returns the array `[ranks * shape[0], *shape[1:]]` of which each rank has a part of `shape`.

    The element at `position` (row-major) of a rank's part is `1 + rank * size + position`: all differ, and
    none is zero. `where_from` decodes them.

    Args:
      ranks: Number of ranks, each with a part, in the order of the array's first axis.
      shape: Shape of one rank's part.
      dtype: Type of the array.

    Raises:
      CmxError: The type cannot represent as many whole numbers exactly as there are elements.

    Example:
      >>> rank_coded(2, (3,)).tolist()
      [1.0, 2.0, 3.0, 4.0, 5.0, 6.0]
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
    """Returns the rank, and the position in its part, of each element of `rank_coded(ranks, shape)`.

    Args:
      coded: Elements of that array, in any order and shape.
      shape: Shape of one rank's part.

    Returns:
      Two int64 arrays of the shape of `coded`; an element that is zero comes from rank -1.

    Example:
      >>> ranks, positions = where_from(rank_coded(2, (3,)), (3,))
      >>> ranks.tolist(), positions.tolist()
      ([0, 0, 0, 1, 1, 1], [0, 1, 2, 0, 1, 2])
    """
    rank, position = np.divmod(np.asarray(coded).astype(np.int64) - 1, math.prod(shape))
    return rank, position
