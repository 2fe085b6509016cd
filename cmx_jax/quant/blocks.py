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

    values = q.astype(np.float32)
    # a matrix of scales as large as the values would take longer than all the rest
    runs = [slice(None)] if block[0] == 1 else [slice(i, i + 1) for i in range(expected[0])]
    for run in runs:
        rows = values if block[0] == 1 else values[run.start * block[0] : run.stop * block[0]]
        if offset is not None:
            rows -= _spread(offset[run], block[1], q.shape[1])
        rows *= _spread(scale[run], block[1], q.shape[1])
    return values


def _spread(x: np.ndarray, width: int, columns: int) -> np.ndarray:
    """A number a block to a number a column; where there is one block, it is left to broadcasting."""
    wide = x.astype(np.float32)
    return wide if width >= columns else np.repeat(wide, width, axis=1)[:, :columns]
