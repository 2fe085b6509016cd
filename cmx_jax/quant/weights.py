"""INT8 weights with one static scale an output channel, and rows as the INT8 matmul reads them: on the host.

A linear map is `w [I, O]`, inputs first, and reads `x [T, I]`. Both become integers from -127 to 127
(section 4.5): rows with a scale of their own each time, output channels with one that is stored.
"""

import numpy as np
from jaxtyping import Float, Float32, Int8

_TINY = np.float32(2.0**-126)  # the least normal number: accelerators take smaller ones for zero


def quantize(w: Float[np.ndarray, "I O"], scale: Float[np.ndarray, "#I #O"]) -> Int8[np.ndarray, "I O"]:
    """`round(w / scale)`, ties to even, cut off at -127 and 127."""
    return _steps(w, scale).astype(np.int8)


def through_int8(w: Float[np.ndarray, "I O"], scale: Float[np.ndarray, " O"]) -> Float32[np.ndarray, "I O"]:
    """What is left of weights once they are INT8: `quantize(w, scale) * scale`."""
    steps = _steps(w, scale[None])
    steps *= scale.astype(np.float32, copy=False)
    return steps


def rows_through_int8(x: Float[np.ndarray, "T I"]) -> Float32[np.ndarray, "T I"]:
    """What is left of rows once they are INT8, each with its own scale: `int8.quantize_rows` in NumPy."""
    scale = largest(x, axis=1)[:, None] / np.float32(127)
    inverse = np.where(scale >= _TINY, 1 / np.maximum(scale, _TINY), np.float32(0))
    return np.clip(np.rint(x.astype(np.float32) * inverse), -127, 127) * scale


def channel_scale(w: Float[np.ndarray, "I O"]) -> Float32[np.ndarray, " O"]:
    """The least storable scale that cuts nothing off: `max|w| / 127` of each output channel, 1 if it is 0."""
    return storable_scale(largest(w, axis=0) / np.float32(127))


def storable_scale(scale: Float[np.ndarray, " O"]) -> Float32[np.ndarray, " O"]:
    """The next larger bfloat16, in float32: storing it loses nothing, and nothing that fitted is cut off.

    Zero becomes 1, and what is below the normal numbers the least of them.

    Raises:
      ValueError: a scale is negative, not finite, or above the largest bfloat16.
    """
    wide = scale.astype(np.float32)
    if not (np.isfinite(wide) & (wide >= 0)).all():
        raise ValueError("scale holds numbers that are negative or not finite")
    normal = np.where(wide > 0, np.maximum(wide, _TINY), np.float32(1))
    # a bfloat16 is the upper half of a float32, and larger numbers have larger bits
    upper = ((normal.view(np.uint32) + np.uint32(0xFFFF)) & np.uint32(0xFFFF0000)).view(np.float32)
    if not np.isfinite(upper).all():
        raise ValueError(f"scale holds {wide.max()}, above the largest bfloat16")
    return upper


def largest(x: Float[np.ndarray, "M N"], axis: int) -> Float32[np.ndarray, " K"]:
    """The largest magnitude along an axis; 0 of nothing."""
    return np.abs(x).max(axis=axis, initial=0).astype(np.float32)


def _steps(w: np.ndarray, scale: np.ndarray) -> np.ndarray:
    steps = w.astype(np.float32, copy=False) / scale.astype(np.float32, copy=False)
    np.rint(steps, out=steps)
    return np.clip(steps, -127, 127, out=steps)
