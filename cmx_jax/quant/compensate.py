"""Error compensation: weights that are not yet rounded make up for the errors of those already rounded.

GPTQ (arXiv 2210.17323). Let `x^T x = a a^T` with `a` upper triangular (Cholesky). The error of an output
channel is `||x e||^2 = sum_i (a[i, i] e[i] + sum_{j < i} a[j, i] e[j])^2`. If inputs are rounded in turn, the
errors made so far therefore move the point to which input `i` rounds by `sum_{j < i} a[j, i] / a[i, i] e[j]`.
This is GPTQ's update (it is the nearest plane algorithm: arXiv 2507.18553), but needs no inverse.
"""

import numpy as np
from jaxtyping import Float, Int8

from cmx_jax.quant.int8_weights import quantize
from cmx_jax.quant.product_errors import checked, squares

_BLOCK = 128  # inputs that take in the errors of all earlier blocks by one matmul


def compensate(
    gram: Float[np.ndarray, "I I"],
    w: Float[np.ndarray, "I O"],
    scale: Float[np.ndarray, " O"],
    *,
    judge: Float[np.ndarray, "I I"] | None = None,
    damp: float = 0.01,
    ordered: bool = True,
) -> Int8[np.ndarray, "I O"]:
    """Rounds weights so that `||x w - x q scale||` is small.

    Channels for which that is no better than plain rounding are rounded plainly.

    Args:
      gram: Gram matrix `x^T x` of the calibration rows.
      w: Weights.
      scale: Scale of each output channel (from `search_clip`).
      judge: Gram matrix of other rows, which decides where plain rounding is better. None takes `gram`
        itself, which does not show overfitting: with few rows, or inputs that do not depend on each other.
      damp: Share of the mean diagonal that is added to the diagonal: few rows leave directions without cost.
      ordered: Rounds inputs of large norm first, while many inputs are left to make up for them.

    Raises:
      ValueError: Numbers are not finite, a scale is not positive, or `gram` is no Gram matrix.
    """
    weights = checked("w", w).astype(np.float64)
    if not (np.isfinite(scale) & (scale > 0)).all():
        raise ValueError("scale holds numbers that are not positive, or not finite")
    damped = _damped(gram, damp)
    order = np.argsort(-np.diag(damped), kind="stable") if ordered else np.arange(len(damped))

    step = scale.astype(np.float64)
    plain = quantize(w, scale[None])
    q = np.empty_like(plain)
    q[order] = _round(_shifts(damped[np.ix_(order, order)]), weights[order], step)
    judge = gram if judge is None else judge
    gains = squares(judge, weights - q * step) < squares(judge, weights - plain * step)
    return np.where(gains, q, plain)


def _damped(gram: np.ndarray, damp: float) -> np.ndarray:
    """Returns the Gram matrix with a larger diagonal.

    The diagonal of inputs that were always zero, on which nothing depends, becomes 1.
    """
    if not np.isfinite(gram).all():
        raise ValueError("gram holds numbers that are not finite, because the activations did")
    diagonal = np.diag(gram)
    if (diagonal < 0).any() or not np.allclose(gram, gram.T, rtol=0, atol=1e-4 * diagonal.max(initial=0)):
        raise ValueError("gram is not symmetric, or negative on its diagonal: expected x^T x")
    seen = diagonal > 0
    added = damp * diagonal[seen].mean() if seen.any() else 0.0
    return gram.astype(np.float64) + np.diag(np.where(seen, added, 1.0))


def _shifts(gram: np.ndarray) -> np.ndarray:
    """Returns `a[j, i] / a[i, i]`, where `gram = a a^T` and `a` is upper triangular."""
    try:
        a = np.linalg.cholesky(gram[::-1, ::-1])[::-1, ::-1]
    except np.linalg.LinAlgError:
        raise ValueError("gram is not positive definite: expected x^T x, or a larger damp") from None
    return a / np.diag(a)


def _round(shifts: np.ndarray, w: np.ndarray, scale: np.ndarray) -> np.ndarray:
    """Rounds input after input.

    A block takes in the errors of earlier blocks by one matmul, and those of its own inputs one by one.
    """
    q, errors = np.empty(w.shape, np.int8), np.zeros_like(w)
    for start in range(0, len(w), _BLOCK):
        block = range(start, min(start + _BLOCK, len(w)))
        points = w[start : block.stop] + shifts[:start, start : block.stop].T @ errors[:start]
        for i, point in zip(block, points, strict=True):
            point += shifts[start:i, i] @ errors[start:i]
            q[i] = np.clip(np.rint(point / scale), -127, 127)
            errors[i] = w[i] - q[i] * scale
    return q
