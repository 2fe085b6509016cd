"""Intervals for accuracies and for what changed between two models that answered the same items.

All intervals are at 95 % and in closed form, without resampling:

* an accuracy: Wilson's score interval (1927);
* the difference of two paired accuracies: Newcombe's method 10 (*Statistics in Medicine* 17, 2635-2650,
  1998), which squares and adds the distances to the Wilson limits, less what the pairs have in common;
* a mean over skills that have equally many items: the same two, for all items together. This counts
  differences between skills as chance, so the interval of the accuracy is wide rather than narrow; the
  interval of a difference hardly changes;
* no change at all: McNemar's exact test, a two-sided sign test of the items that flipped.
"""

import math
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from jaxtyping import Bool, Float

Z = 1.959963984540054  # the normal distribution's 97.5 % point


@dataclass(frozen=True)
class Estimate:
    """A number and its 95 % interval.

    Attributes:
      value: Estimated number.
      low: Lower limit; minus infinity if there is no interval.
      high: Upper limit; infinity if there is no interval.
    """

    value: float
    low: float
    high: float


@lru_cache(1 << 10)  # a call takes about a millisecond, and simulations repeat their counts
def wilson(successes: int, count: int) -> Estimate:
    """A proportion with Wilson's score interval."""
    from scipy.stats import binomtest

    interval = binomtest(successes, count).proportion_ci(0.95, method="wilson")
    return Estimate(successes / count, float(interval.low), float(interval.high))


@dataclass(frozen=True)
class Pairs:
    """Numbers of items that two models answered.

    Attributes:
      both: Items that both models answered correctly.
      first: Items that only the first model answered correctly (right -> wrong).
      second: Items that only the second model answered correctly (wrong -> right).
      none: Items that neither model answered correctly.
    """

    both: int
    first: int
    second: int
    none: int

    @classmethod
    def of(cls, first: Bool[np.ndarray, " items"], second: Bool[np.ndarray, " items"]) -> "Pairs":
        """Counts the items, given which ones each model answered correctly."""
        masks = (first & second, first & ~second, ~first & second, ~first & ~second)
        return cls(*(int(np.count_nonzero(mask)) for mask in masks))

    @property
    def count(self) -> int:
        return self.both + self.first + self.second + self.none


def mcnemar(pairs: Pairs) -> float:
    """Exact two-sided p-value: the chance of flips at least as one-sided when neither side is likelier."""
    from scipy.stats import binomtest

    flips = pairs.first + pairs.second
    return float(binomtest(pairs.first, flips).pvalue) if flips else 1.0


def difference(pairs: Pairs) -> Estimate:
    """Accuracy of the second model minus that of the first, by Newcombe's method 10."""
    p1, p2 = wilson(pairs.both + pairs.first, pairs.count), wilson(pairs.both + pairs.second, pairs.count)
    phi, value = _correlation(pairs), (pairs.second - pairs.first) / pairs.count

    def combined(distance1: float, distance2: float) -> float:
        return math.sqrt(max(distance1**2 - 2 * phi * distance1 * distance2 + distance2**2, 0.0))

    low = value - combined(p1.high - p1.value, p2.value - p2.low)
    return Estimate(value, low, value + combined(p1.value - p1.low, p2.high - p2.value))


def _correlation(pairs: Pairs) -> float:
    """Newcombe's phi of the 2x2 table, continuity-corrected where positive; 0 if a margin is empty."""
    a, b, c, d = pairs.both, pairs.first, pairs.second, pairs.none
    margins = (a + b) * (c + d) * (a + c) * (b + d)
    excess = float(a * d - b * c)
    if excess > 0:
        excess = max(excess - pairs.count / 2, 0.0)
    return excess / math.sqrt(margins) if margins else 0.0


def of_sample(values: Float[np.ndarray, " items"]) -> Estimate:
    """Mean over equally large parts of a text, with a normal interval; a single part has no interval."""
    value, count = float(np.mean(values)), len(values)
    half = Z * float(np.std(values, ddof=1)) / math.sqrt(count) if count > 1 else math.inf
    return Estimate(value, value - half, value + half)
