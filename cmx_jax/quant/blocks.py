"""Arrays stored as small numbers with one scale for each block: one block a row, a square, a whole matrix."""

import numpy as np


def grid(shape: tuple[int, int], block: tuple[int, int]) -> tuple[int, int]:
    """How many blocks a matrix has along each axis; the last ones may be smaller."""
    return -(-shape[0] // block[0]), -(-shape[1] // block[1])


def dequantize_blocks(
    q: np.ndarray, scale: np.ndarray, block: tuple[int, int], offset: np.ndarray | None = None
) -> np.ndarray:
    """`(q - offset) * scale` in float32, each scale (and offset) holding for one block.

    Args:
      q: [M, N], integers or FP8.
      scale: one number a block, `grid(q.shape, block)`.
      block: rows and columns of a block: `(1, N)` is a scale a row (output channel), `(M, N)` one for all.
      offset: as `scale`; None is zero.
    """
    expected = grid((q.shape[0], q.shape[1]), block)
    if scale.shape != expected:
        raise ValueError(f"scale has shape {scale.shape}, expected {expected}")

    def spread(x: np.ndarray) -> np.ndarray:
        wide = np.repeat(x.astype(np.float32), block[0], axis=0)[: q.shape[0]]
        return wide if block[1] >= q.shape[1] else np.repeat(wide, block[1], axis=1)[:, : q.shape[1]]

    values = q.astype(np.float32)
    if offset is not None:
        values -= spread(offset)
    values *= spread(scale)
    return values


def quantize_channels(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Symmetric INT8 with one static scale a row (output channel), `max|row| / 127`: section 4.5's weights.

    Returns:
      int8 [M, N] within -127 to 127, and float32 [M, 1]; an all-zero row has scale 1.
    """
    wide = x.astype(np.float32)
    scale = np.abs(wide).max(axis=1, keepdims=True) / np.float32(127)
    scale = np.where(scale > 0, scale, np.float32(1))
    return np.clip(np.rint(wide / scale), -127, 127).astype(np.int8), scale
