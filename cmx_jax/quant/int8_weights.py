"""INT8 weights and INT8 rows in NumPy, on the host.

A linear map is `w [I, O]`, inputs first, and reads `x [T, I]`. Both become integers from -127 to 127 (section
4.5): weights with a stored scale for each output channel, rows with a scale computed each time, as the INT8
matmul reads them.
"""

import numpy as np
from jaxtyping import Float, Float32, Int8

_TINY = np.float32(2.0**-126)  # smallest normal number: accelerators treat smaller ones as zero


def quantize(w: Float[np.ndarray, "I O"], scale: Float[np.ndarray, "#I #O"]) -> Int8[np.ndarray, "I O"]:
    """Computes `round(w / scale)`, ties to even, clipped to -127 and 127."""
    return _steps(w, scale).astype(np.int8)


def through_int8(w: Float[np.ndarray, "I O"], scale: Float[np.ndarray, " O"]) -> Float32[np.ndarray, "I O"]:
    """Rounds weights to INT8 and back: `quantize(w, scale) * scale`."""
    steps = _steps(w, scale[None])
    steps *= scale.astype(np.float32, copy=False)
    return steps


def rows_through_int8(x: Float[np.ndarray, "T I"]) -> Float32[np.ndarray, "T I"]:
    """Rounds rows to INT8 and back, each with its own scale, as `int8.quantize_rows` does in JAX."""
    scale = largest(x, axis=1)[:, None] / np.float32(127)
    inverse = np.where(scale >= _TINY, 1 / np.maximum(scale, _TINY), np.float32(0))
    return np.clip(np.rint(x.astype(np.float32) * inverse), -127, 127) * scale


def channel_scale(w: Float[np.ndarray, "I O"]) -> Float32[np.ndarray, " O"]:
    """Smallest storable scale of each output channel that clips nothing: `max|w| / 127`, or 1 if it is 0."""
    return storable_scale(largest(w, axis=0) / np.float32(127))


def storable_scale(scale: Float[np.ndarray, " O"]) -> Float32[np.ndarray, " O"]:
    """Rounds scales up to bfloat16, in float32.

    Storing such a scale loses nothing, and weights that fitted its range still fit.

    Zero becomes 1; other scales below the smallest normal number become that number.

    Raises:
      ValueError: A scale is negative, not finite, or above the largest bfloat16.
    """
    numbers = scale.astype(np.float32)
    if not (np.isfinite(numbers) & (numbers >= 0)).all():
        raise ValueError("scale holds numbers that are negative or not finite")
    normal = np.where(numbers > 0, np.maximum(numbers, _TINY), np.float32(1))
    # a bfloat16 is the upper half of a float32, and larger numbers have larger bits
    upper = ((normal.view(np.uint32) + np.uint32(0xFFFF)) & np.uint32(0xFFFF0000)).view(np.float32)
    if not np.isfinite(upper).all():
        raise ValueError(f"scale holds {numbers.max()}, above the largest bfloat16")
    return upper


def largest(x: Float[np.ndarray, "rows columns"], axis: int) -> Float32[np.ndarray, " _"]:
    """Largest magnitude along an axis; 0 if the axis is empty."""
    return np.abs(x).max(axis=axis, initial=0).astype(np.float32)


def _steps(w: np.ndarray, scale: np.ndarray) -> np.ndarray:
    steps = w.astype(np.float32, copy=False) / scale.astype(np.float32, copy=False)
    np.rint(steps, out=steps)
    return np.clip(steps, -127, 127, out=steps)
