"""One scale for each input, moved from activations into weights, so that both round well (section 4.5).

`s* = argmin_s ||Q(w s) Q(x / s) - w x||`: an input that is large for all tokens (an outlier channel) makes
every token's scale large and costs all other inputs their bits. `x / s` is free where the tensor that
produces `x` can be multiplied by `1 / s`: a norm's weight, or the output channels of the matrix before.

Candidates are `max|x|^a / max|w|^b` for `a` from 0 to 1, with `b = 1 - a` (SmoothQuant, arXiv 2211.10438) and
with `b = 0` (as AWQ, arXiv 2306.00978). The objective itself, both sides in INT8, chooses among them, on rows
other than those that gave the maxima: on the same rows, a few outlying rows would decide.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float

from cmx_jax.quant.int8_weights import channel_scale, largest, rows_through_int8, through_int8
from cmx_jax.quant.product_errors import checked, relative

_OCTAVES = 12  # scales lie between 2^-12 and 2^12


class Scales(NamedTuple):
    """Result of `search_scales`.

    Attributes:
      s: Scale of each input, float32 [I], for `x / s` and `w * s[:, None]`.
      before: Relative error in INT8 without scales.
      after: Relative error in INT8 with scales.
    """

    s: np.ndarray
    before: float
    after: float


def search_scales(
    x: Float[np.ndarray, "T I"],
    weights: Sequence[Float[np.ndarray, "I _"]],
    *,
    points: int = 20,
    power_of_two: bool = False,
) -> Scales:
    """Searches the best scales for all matrices that read `x`; all 1 if none are better on these rows.

    Args:
      x: Calibration rows. Even and odd rows judge the scales made from each other.
      weights: Matrices that read the same input (gate and up; q_a and kv_a) and hence share `s`.
      points: Number of steps of `a` from 0 to 1.
      power_of_two: Only tries powers of two, by which a bfloat16 tensor is multiplied without rounding.

    Raises:
      ValueError: Numbers are not finite.
    """
    rows = checked("x", x)
    maps = [checked(f"weights[{i}]", w) for i, w in enumerate(weights)]
    weight_maxima = np.max([largest(w, axis=1) for w in maps], axis=0, initial=0)
    maxima = [largest(part, axis=0) for part in (rows[1::2], rows[::2])]
    parts = [_objective(part, maps) for part in (rows[::2], rows[1::2])]

    def error(scales: Sequence[np.ndarray]) -> float:
        return sum(part(s) for part, s in zip(parts, scales, strict=True))

    one = np.ones(rows.shape[1], np.float32)
    before = least = error([one, one])
    exponents = None
    grid = [float(a) for a in np.linspace(0, 1, points + 1)]
    for pair in sorted({(a, b) for a in grid for b in (0.0, 1 - a)}):
        trial = error([_scales(x_max, weight_maxima, *pair, power_of_two) for x_max in maxima])
        if trial < least:
            least, exponents = trial, pair

    norm = sum(float(np.square(rows @ w, dtype=np.float64).sum()) for w in maps)
    if exponents is not None:
        s = _scales(largest(rows, axis=0), weight_maxima, *exponents, power_of_two)
        if (after := error([s, s])) < before:
            return Scales(s, relative(before, norm), relative(after, norm))
    return Scales(one, relative(before, norm), relative(before, norm))


def _scales(x_max: np.ndarray, w_max: np.ndarray, a: float, b: float, power_of_two: bool) -> np.ndarray:
    """Computes `x_max^a / w_max^b` with geometric mean 1.

    Inputs that are always zero, or whose weights are all zero, get 1.
    """
    live = (x_max > 0) & (w_max > 0)
    log = a * np.log2(np.where(live, x_max, 1)) - b * np.log2(np.where(live, w_max, 1))
    log -= log.sum() / max(int(live.sum()), 1)
    log = np.clip(np.rint(log) if power_of_two else log, -_OCTAVES, _OCTAVES)
    return np.exp2(np.where(live, log, 0)).astype(np.float32)


def _objective(x: np.ndarray, weights: Iterable[np.ndarray]) -> Callable[[np.ndarray], float]:
    """Returns the function `s -> ||Q(x / s) Q(w s) - x w||^2`, summed over the matrices."""
    products = [(w, x @ w) for w in weights]

    def error(s: np.ndarray) -> float:
        rows, total = rows_through_int8(x / s), 0.0
        for w, exact in products:
            scaled = w * s[:, None]
            off = rows @ through_int8(scaled, channel_scale(scaled)) - exact
            total += float(np.square(off, dtype=np.float64).sum())
        return total

    return error
