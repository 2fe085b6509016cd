"""How far off a product is: what calibration rows say about errors in weights."""

import numpy as np
from jaxtyping import Float, Float32, Float64


def gram(x: Float[np.ndarray, "T I"]) -> Float64[np.ndarray, "I I"]:
    """`x^T x`; that of several batches of rows is the sum of theirs."""
    wide = x.astype(np.float64)
    return wide.T @ wide


def squares(gram: Float[np.ndarray, "I I"], e: Float[np.ndarray, "I O"]) -> Float64[np.ndarray, " O"]:
    """`||x e||^2` of each column, given `gram = x^T x`."""
    wide = e.astype(np.float64)
    return np.maximum(np.einsum("io,io->o", gram @ wide, wide), 0)


def relative(error: float, norm: float) -> float:
    """`sqrt(error / norm)` of two sums of squares; an error in nothing is infinite, no error is 0."""
    return float(np.sqrt(error / norm)) if norm > 0 else np.inf if error > 0 else 0.0


def checked(name: str, x: Float[np.ndarray, "M N"]) -> Float32[np.ndarray, "M N"]:
    """As float32.

    Raises:
      ValueError: it holds NaN or infinity; says where.
    """
    wide = x.astype(np.float32, copy=False)
    if not np.isfinite(wide).all():
        row, column = np.argwhere(~np.isfinite(wide))[0]
        raise ValueError(f"{name} [{row}, {column}] is {wide[row, column]}, expected finite numbers")
    return wide
