"""Intervals for accuracies and for what changed between two models that answered the same items.

All intervals are at 95 %. Closed forms, no resampling:

* an accuracy: Wilson's score interval (1927);
* the difference of two paired accuracies: Newcombe's method 10 (*Statistics in Medicine* 17, 2635-2650,
  1998), which squares and adds the distances to the Wilson limits, less what the pairs have in common;
* a mean over skills that have equally many items: the same two, of all items together. That counts what the
  skills differ by as chance, so that the interval of the accuracy is wide rather than narrow; differences
  hardly notice;
* no change at all: McNemar's exact test, a two-sided sign test of the items that flipped.
"""

import math
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float

Z = 1.959963984540054  # the normal distribution's 97.5 % point


@dataclass(frozen=True)
class Estimate:
    """A number and its 95 % interval."""

    value: float
    low: float
    high: float


def wilson(successes: int, count: int) -> Estimate:
    """A proportion with Wilson's score interval."""
    p, spread = successes / count, Z * Z / count
    middle = (p + spread / 2) / (1 + spread)
    half = math.sqrt(p * (1 - p) * spread + spread * spread / 4) / (1 + spread)
    return Estimate(p, min(max(middle - half, 0.0), p), max(min(middle + half, 1.0), p))


@dataclass(frozen=True)
class Pairs:
    """Two models on the same items: how many both answered rightly, only the first, only the second, none."""

    both: int
    first: int  # right -> wrong
    second: int  # wrong -> right
    none: int

    @classmethod
    def of(cls, first: Bool[np.ndarray, " items"], second: Bool[np.ndarray, " items"]) -> "Pairs":
        counts = (first & second, first & ~second, ~first & second, ~first & ~second)
        return cls(*(int(np.count_nonzero(of)) for of in counts))

    @property
    def count(self) -> int:
        return self.both + self.first + self.second + self.none


def mcnemar(pairs: Pairs) -> float:
    """Exact two-sided p-value: the chance of flips at least as one-sided when neither side is likelier."""
    flips, fewer = pairs.first + pairs.second, min(pairs.first, pairs.second)
    largest = math.lgamma(flips + 1) - flips * math.log(2)
    tail = (math.exp(largest - math.lgamma(k + 1) - math.lgamma(flips - k + 1)) for k in range(fewer + 1))
    return min(1.0, 2 * math.fsum(tail))


def difference(pairs: Pairs) -> Estimate:
    """Accuracy of the second model minus that of the first, by Newcombe's method 10."""
    p1, p2 = wilson(pairs.both + pairs.first, pairs.count), wilson(pairs.both + pairs.second, pairs.count)
    phi, value = _correlation(pairs), (pairs.second - pairs.first) / pairs.count

    def together(of_first: float, of_second: float) -> float:
        return math.sqrt(max(of_first**2 - 2 * phi * of_first * of_second + of_second**2, 0.0))

    low = value - together(p1.high - p1.value, p2.value - p2.low)
    return Estimate(value, low, value + together(p1.value - p1.low, p2.high - p2.value))


def _correlation(pairs: Pairs) -> float:
    """Newcombe's phi of the 2x2 table, continuity-corrected where positive; 0 if a margin is empty."""
    a, b, c, d = pairs.both, pairs.first, pairs.second, pairs.none
    margins = (a + b) * (c + d) * (a + c) * (b + d)
    excess = float(a * d - b * c)
    if excess > 0:
        excess = max(excess - pairs.count / 2, 0.0)
    return excess / math.sqrt(margins) if margins else 0.0


def of_sample(values: Float[np.ndarray, " n"]) -> Estimate:
    """Mean of equally large parts of a text, with the normal interval of their scatter (none of one part)."""
    value, count = float(np.mean(values)), len(values)
    half = Z * float(np.std(values, ddof=1)) / math.sqrt(count) if count > 1 else math.inf
    return Estimate(value, value - half, value + half)
