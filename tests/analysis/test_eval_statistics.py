"""The intervals and the test against published examples, and their coverage in simulation."""

import math

import numpy as np
import pytest

from cmx_jax.analysis.eval.statistics import Estimate, Pairs, difference, mcnemar, of_sample, wilson


@pytest.mark.parametrize(
    ("successes", "count", "low", "high"),
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)],
)
def test_wilson_gives_newcombes_table(successes, count, low, high) -> None:
    """Table I of Newcombe, Statistics in Medicine 17, 857-872 (1998), method 3."""
    estimate = wilson(successes, count)
    assert estimate.value == successes / count
    assert (estimate.low, estimate.high) == pytest.approx((low, high), abs=5e-5)


def test_wilson_stays_within_the_bounds() -> None:
    assert wilson(0, 5).low == 0.0
    assert wilson(5, 5).high == 1.0


AIRWAY = Pairs(both=1, first=1, second=7, none=12)
"""Airway hyper-responsiveness before and after stem cell transplantation (Bentur 2009), the example of
Fagerland, Lydersen and Laake, BMC Medical Research Methodology 13:91 and Statistics in Medicine 33 (2014)."""


def test_mcnemar_gives_the_published_p_value() -> None:
    assert mcnemar(AIRWAY) == pytest.approx(0.0703, abs=5e-5)


@pytest.mark.parametrize(
    ("first", "second", "p"), [(0, 0, 1.0), (3, 3, 1.0), (0, 5, 2 / 32), (5, 0, 2 / 32), (1, 4, 12 / 32)]
)
def test_mcnemar_counts_coin_tosses(first, second, p) -> None:
    assert mcnemar(Pairs(9, first, second, 4)) == pytest.approx(p, rel=1e-12)


def test_mcnemar_of_many_flips_is_the_normal_limit() -> None:
    """Compares with the chi-squared test of the same name, which has the continuity correction."""
    z = (abs(5150 - 4850) - 1) / math.sqrt(10_000)
    assert mcnemar(Pairs(0, 5150, 4850, 0)) == pytest.approx(math.erfc(z / math.sqrt(2)), rel=0.01)


def test_newcombes_interval_is_the_published_one() -> None:
    estimate = difference(AIRWAY)
    assert estimate.value == 6 / 21
    assert (estimate.low, estimate.high) == pytest.approx((0.026, 0.507), abs=5e-4)


def test_difference_changes_sign_with_its_pairs() -> None:
    one, other = difference(Pairs(30, 8, 3, 9)), difference(Pairs(30, 3, 8, 9))
    assert (one.value, one.low, one.high) == pytest.approx((-other.value, -other.high, -other.low))


@pytest.mark.parametrize(
    "pairs", [Pairs(0, 0, 0, 9), Pairs(9, 0, 0, 0), Pairs(0, 9, 0, 0), Pairs(0, 0, 9, 0)]
)
def test_difference_without_discordant_pairs_has_bounded_interval(pairs) -> None:
    estimate = difference(pairs)
    assert -1 <= estimate.low <= estimate.value <= estimate.high <= 1
    assert estimate.high - estimate.low > 0.2


def test_pairs_are_counted() -> None:
    first, second = np.asarray([1, 1, 0, 0, 0], bool), np.asarray([1, 0, 1, 1, 0], bool)
    assert Pairs.of(first, second) == Pairs(1, 1, 2, 1)


MIXED = ((0.55, 0.12, 0.06, 0.27), (0.9, 0.01, 0.01, 0.08), (0.04, 0.01, 0.0, 0.95), (0.97, 0.01, 0.0, 0.02))


@pytest.mark.parametrize("skills", [1, 4])
@pytest.mark.slow
def test_intervals_hold_the_truth_as_often_as_they_say(skills) -> None:
    """Pairs of models that answer 60 items a skill: 95 % of the time, of skills unlike each other too."""
    rng, chances = np.random.default_rng(0), np.asarray(MIXED[:skills])
    truth = np.mean(chances[:, 2] - chances[:, 1])
    samples = sum(rng.multinomial(60, row, 2000) for row in chances)
    estimates = [difference(Pairs(*map(int, sample))) for sample in samples]
    assert 0.94 < np.mean([estimate.low <= truth <= estimate.high for estimate in estimates]) < 0.97


def test_sample_of_one_has_no_interval() -> None:
    assert of_sample(np.asarray([2.0])) == Estimate(2.0, -math.inf, math.inf)
    estimate = of_sample(np.asarray([1.0, 2.0, 3.0, 6.0]))
    assert estimate.value == 3.0
    assert estimate.high - 3.0 == pytest.approx(1.959964 * math.sqrt(14 / 3) / 2)
