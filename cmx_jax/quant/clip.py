"""Clipping of weights: a smaller range rounds more finely and cuts off the few weights outside (section 4.5).

The search is `argmin_alpha ||x w - x Q(w; alpha)||`, where `Q` has the scale `alpha max|w| / 127`, with one
alpha for each output channel or for each block of channels.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float

from cmx_jax.quant.int8_weights import largest, storable_scale, through_int8
from cmx_jax.quant.product_errors import checked, gram, relative, squares

ALPHAS = tuple(float(a) for a in np.linspace(0.975, 0.5, 20))
_CHANNELS = 1024  # output channels whose errors are in memory at once


class Clip(NamedTuple):
    """Result of `search_clip`.

    Attributes:
      alpha: Share of its range that each output channel keeps, float32 [O].
      scale: Storable scale of each output channel, float32 [O].
      before: Relative error of `x w` without clipping.
      after: Relative error of `x w` with clipping.
    """

    alpha: np.ndarray
    scale: np.ndarray
    before: float
    after: float


def search_clip(
    x: Float[np.ndarray, "T I"],
    w: Float[np.ndarray, "I O"],
    *,
    alphas: Sequence[float] = ALPHAS,
    block: int = 1,
) -> Clip:
    """Searches the share of its range that each output channel keeps: 1 where no smaller share is better.

    Args:
      x: Calibration rows (a hundred or more), or any matrix with the same `x^T x`.
      w: Weights.
      alphas: Candidates besides 1.
      block: Number of neighbouring output channels that share alpha.

    Raises:
      ValueError: Numbers are not finite, an alpha is not above 0 and at most 1, or a block is below 1.
    """
    if block < 1 or not all(0 < a <= 1 for a in alphas):
        raise ValueError(f"block {block}, alphas {alphas}: expected block >= 1 and 0 < alpha <= 1")
    measure, weights = _measure(checked("x", x)), checked("w", w)
    width = max(1, _CHANNELS // block) * block
    starts = range(0, weights.shape[1], width)
    parts = [_search(measure, weights[:, i : i + width], alphas, block) for i in starts]
    alpha, scale, before, after, norm = np.concatenate(parts, axis=1)
    return Clip(
        alpha.astype(np.float32),
        scale.astype(np.float32),
        relative(before.sum(), norm.sum()),
        relative(after.sum(), norm.sum()),
    )


def _measure(x: np.ndarray) -> Callable[[np.ndarray], np.ndarray]:
    """Returns a function that computes `||x e||^2` for each column of `e`.

    For many rows it uses their Gram matrix, which is smaller.
    """
    if x.shape[0] <= x.shape[1]:
        return lambda e: np.square(x @ e, dtype=np.float64).sum(axis=0)
    products = gram(x)
    return lambda e: squares(products, e)


def _search(
    measure: Callable[[np.ndarray], np.ndarray], w: np.ndarray, alphas: Sequence[float], block: int
) -> np.ndarray:
    """Returns alpha, scale, error with alpha 1, error and norm of each output channel, float64 [5, O]."""
    full_scale = largest(w, axis=0) / np.float32(127)
    first = np.arange(0, w.shape[1], block)

    def candidate(alpha: float) -> np.ndarray:
        scale = storable_scale(full_scale * np.float32(alpha))
        return np.stack([np.full_like(scale, alpha), scale, measure(w - through_int8(w, scale))])

    plain = best = candidate(1.0)
    for alpha in alphas:
        new = candidate(alpha)
        better = np.add.reduceat(new[2], first) < np.add.reduceat(best[2], first)
        best = np.where(np.repeat(better, block)[: w.shape[1]], new, best)
    return np.stack([best[0], best[1], plain[2], best[2], measure(w)])
