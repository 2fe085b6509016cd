"""Matrices stored as small numbers with one scale per block: a row, a square, or the whole matrix."""

import numpy as np


def grid(shape: tuple[int, int], block: tuple[int, int]) -> tuple[int, int]:
    """Number of blocks of a matrix along each axis. The last block of an axis may be smaller."""
    return -(-shape[0] // block[0]), -(-shape[1] // block[1])


def dequantize_blocks(
    q: np.ndarray, scale: np.ndarray, block: tuple[int, int], offset: np.ndarray | None = None
) -> np.ndarray:
    """Computes `(q - offset) * scale` in float32, each scale (and offset) holding for one block.

    Args:
      q: Matrix [rows, columns] of integers or FP8 numbers.
      scale: Scale of each block, of shape `grid(q.shape, block)`.
      block: Rows and columns of a block: `(1, columns)` is one scale per row (output channel),
        `(rows, columns)` one scale for all.
      offset: Offset of each block, of the same shape as `scale`; None is zero.

    Raises:
      ValueError: The shape of `scale` is another one.
    """
    expected = grid((q.shape[0], q.shape[1]), block)
    if scale.shape != expected:
        raise ValueError(f"scale has shape {scale.shape}, expected {expected}")

    values = q.astype(np.float32)
    # expanding the scales to a matrix as large as the values would take longer than everything else
    runs = [slice(None)] if block[0] == 1 else [slice(i, i + 1) for i in range(expected[0])]
    for run in runs:
        rows = values if block[0] == 1 else values[run.start * block[0] : run.stop * block[0]]
        if offset is not None:
            rows -= _spread(offset[run], block[1], q.shape[1])
        rows *= _spread(scale[run], block[1], q.shape[1])
    return values


def _spread(x: np.ndarray, width: int, columns: int) -> np.ndarray:
    """Repeats the number of each block for its columns. One block for all columns is left to broadcasting."""
    numbers = x.astype(np.float32)
    return numbers if width >= columns else np.repeat(numbers, width, axis=1)[:, :columns]
