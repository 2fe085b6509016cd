"""Clipping of weights: a smaller range rounds finer, and cuts off the few weights outside it (section 4.5).

`argmin_alpha ||x w - x Q(w; alpha)||`, where `Q` has the scale `alpha max|w| / 127`: one alpha for each
output channel, or for each block of them.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float

from cmx_jax.quant.measure import checked, gram, relative, squares
from cmx_jax.quant.weights import largest, storable_scale, through_int8

ALPHAS = tuple(float(a) for a in np.linspace(0.975, 0.5, 20))
_CHANNELS = 1024  # whose errors are held at once


class Clip(NamedTuple):
    """`alpha [O]` and the storable `scale [O]`, float32; relative error of `x w` without and with them."""

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
    """The share of its range that each output channel keeps: 1 where no smaller one is better.

    Args:
      x: calibration rows (a hundred or more), or any matrix of the same `x^T x`.
      w: weights.
      alphas: what is tried besides 1.
      block: so many neighbouring output channels share alpha.

    Raises:
      ValueError: numbers that are not finite, an alpha not above 0 and at most 1, or a block below 1.
    """
    if block < 1 or not all(0 < a <= 1 for a in alphas):
        raise ValueError(f"block {block}, alphas {alphas}: expected block >= 1 and 0 < alpha <= 1")
    measure, wide = _measure(checked("x", x)), checked("w", w)
    width = max(1, _CHANNELS // block) * block
    starts = range(0, wide.shape[1], width)
    parts = [_search(measure, wide[:, i : i + width], alphas, block) for i in starts]
    alpha, scale, before, after, norm = np.concatenate(parts, axis=1)
    return Clip(
        alpha.astype(np.float32),
        scale.astype(np.float32),
        relative(before.sum(), norm.sum()),
        relative(after.sum(), norm.sum()),
    )


def _measure(x: np.ndarray) -> Callable[[np.ndarray], np.ndarray]:
    """`||x e||^2` of each column of `e`: of many rows, by their Gram matrix, which is smaller."""
    if x.shape[0] <= x.shape[1]:
        return lambda e: np.square(x @ e, dtype=np.float64).sum(axis=0)
    whole = gram(x)
    return lambda e: squares(whole, e)


def _search(
    measure: Callable[[np.ndarray], np.ndarray], w: np.ndarray, alphas: Sequence[float], block: int
) -> np.ndarray:
    """Of each output channel: alpha, scale, error with alpha 1, error, norm; float64 [5, O]."""
    whole = largest(w, axis=0) / np.float32(127)
    first = np.arange(0, w.shape[1], block)

    def tried(alpha: float) -> np.ndarray:
        scale = storable_scale(whole * np.float32(alpha))
        return np.stack([np.full_like(scale, alpha), scale, measure(w - through_int8(w, scale))])

    plain = best = tried(1.0)
    for alpha in alphas:
        new = tried(alpha)
        better = np.add.reduceat(new[2], first) < np.add.reduceat(best[2], first)
        best = np.where(np.repeat(better, block)[: w.shape[1]], new, best)
    return np.stack([best[0], best[1], plain[2], best[2], measure(w)])
