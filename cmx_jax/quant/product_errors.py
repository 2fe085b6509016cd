"""Errors of products `x w` on calibration rows `x`."""

import numpy as np
from jaxtyping import Float, Float32, Float64


def gram(x: Float[np.ndarray, "T I"]) -> Float64[np.ndarray, "I I"]:
    """Gram matrix `x^T x`. The matrix of several batches of rows is the sum of theirs."""
    rows = x.astype(np.float64)
    return rows.T @ rows


def squares(gram: Float[np.ndarray, "I I"], e: Float[np.ndarray, "I O"]) -> Float64[np.ndarray, " O"]:
    """Computes `||x e||^2` for each column of `e` from `gram = x^T x`."""
    errors = e.astype(np.float64)
    return np.maximum(np.einsum("io,io->o", gram @ errors, errors), 0)


def relative(error: float, norm: float) -> float:
    """Relative error `sqrt(error / norm)` from two sums of squares.

    Without a norm it is infinite if there is an error, else 0.
    """
    return float(np.sqrt(error / norm)) if norm > 0 else np.inf if error > 0 else 0.0


def checked(name: str, x: Float[np.ndarray, "rows columns"]) -> Float32[np.ndarray, "rows columns"]:
    """Returns the matrix as float32.

    Args:
      name: Name of the matrix for the error message.
      x: Matrix.

    Raises:
      ValueError: The matrix holds NaN or infinity; the message names the first such entry.
    """
    numbers = x.astype(np.float32, copy=False)
    if not np.isfinite(numbers).all():
        row, column = np.argwhere(~np.isfinite(numbers))[0]
        raise ValueError(f"{name} [{row}, {column}] is {numbers[row, column]}, expected finite numbers")
    return numbers
