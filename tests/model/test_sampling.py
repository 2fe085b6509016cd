"""Sampling: greedy rows, draws that depend on seed and position alone, and the right distribution."""

import jax
import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from cmx_jax.model.sampling import Sampling, greedy, sample

VOCAB = 8
DRAWS = 4096  # a token of probability 0.01 is missed by all of them once in e^41
draw = jax.jit(sample)


def rows(
    size: int, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0, seed: int | None = None
) -> Sampling:
    """The same parameters in every row; without `seed` each row has its own."""
    seeds = np.arange(size) if seed is None else np.full(size, seed)
    return Sampling(
        np.full(size, temperature, np.float32),
        np.full(size, top_k, np.int32),
        np.full(size, top_p, np.float32),
        seeds.astype(np.uint32),
    )


def places(size: int, position: int = 0) -> np.ndarray:
    return np.full(size, position, np.int32)


def random_logits(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(0, 3, shape).astype(np.float32)


def softmax(logits: np.ndarray) -> np.ndarray:
    e = np.exp(logits.astype(np.float64) - logits.max())
    return e / e.sum()


def drawn(logits: np.ndarray, s: Sampling) -> np.ndarray:
    """Number of draws of each token from one row of logits, with the DRAWS seeds of `s`."""
    tokens = draw(np.tile(logits, (DRAWS, 1)), s, places(DRAWS))
    return np.bincount(tokens, minlength=len(logits))


@given(st.integers(0, 2**32 - 1))
@settings(deadline=None, max_examples=20)
def test_greedy_is_the_likeliest_token(seed: int) -> None:
    logits = random_logits(seed, 5, 64)
    np.testing.assert_array_equal(greedy(jax.numpy.asarray(logits)), logits.argmax(axis=-1))


def test_greedy_takes_the_first_of_equals() -> None:
    logits = jax.numpy.asarray([[0.0, 2.0, 1.0, 2.0], [-1.0, -1.0, -1.0, -1.0]])
    np.testing.assert_array_equal(greedy(logits), [1, 0])


@given(st.integers(0, 2**32 - 1))
@settings(deadline=None, max_examples=20)
def test_rows_of_temperature_zero_are_greedy_in_a_sampled_batch(seed: int) -> None:
    logits = random_logits(seed, 6, 64)
    s = rows(6, temperature=5.0).replace(temperature=np.array([0, 5, 0, 5, 0, 5], np.float32))
    tokens = np.asarray(draw(logits, s, places(6)))
    np.testing.assert_array_equal(tokens[::2], logits[::2].argmax(axis=-1))


@pytest.mark.parametrize(
    "limits",
    [{"top_k": 1}, {"top_p": 1e-6}, {"temperature": 1e-4}, {"temperature": 2e-38}],
    ids=str,
)
def test_tightest_limits_leave_the_likeliest_token(limits: dict[str, float]) -> None:
    logits = random_logits(0, 32, 64) + np.float32(20)  # divided by 2e-38 all of them are infinite
    tokens = draw(logits, rows(32, **{"temperature": 5.0} | limits), places(32))
    np.testing.assert_array_equal(tokens, logits.argmax(axis=-1))


@given(st.integers(0, 2**32 - 1), st.integers(0, 2**31 - 1), st.integers(0, 5), st.integers(0, 5))
@settings(deadline=None, max_examples=30)
def test_draw_is_independent_of_row_and_batch(seed, position, row, other) -> None:
    mine = random_logits(1, 64)

    def token_in(row: int, company: int) -> int:
        rng = np.random.default_rng(company)
        logits, positions = random_logits(company, 6, 64), rng.integers(0, 2**31, 6).astype(np.int32)
        s = Sampling(
            rng.uniform(0, 9, 6).astype(np.float32),
            rng.integers(0, 64, 6).astype(np.int32),
            rng.uniform(0.1, 1, 6).astype(np.float32),
            rng.integers(0, 2**32, 6).astype(np.uint32),
        )
        logits[row], positions[row], s.temperature[row], s.top_k[row] = mine, position, 2.0, 40
        s.top_p[row], s.seed[row] = 0.95, seed
        return int(draw(logits, s, positions)[row])

    assert token_in(row, company=1) == token_in(other, company=2)


def test_seeds_and_positions_draw_differently() -> None:
    logits = np.zeros((64, 1024), np.float32)
    by_seed = draw(logits, rows(64), places(64))
    by_position = draw(logits, rows(64, seed=5), np.arange(64, dtype=np.int32))
    far_apart = draw(logits, rows(64).replace(seed=(np.arange(64) << 26).astype(np.uint32)), places(64))
    for tokens in (by_seed, by_position, far_apart):
        assert len(set(tokens.tolist())) > 48  # 62 of 64 are expected; equal streams would give few


def test_draws_of_the_next_seed_do_not_repeat_positions() -> None:
    logits, positions = np.zeros((64, 1024), np.float32), np.arange(64, dtype=np.int32)
    mine = np.asarray(draw(logits, rows(64, seed=5), positions))
    for shift in (-1, 1):
        shifted = np.asarray(draw(logits, rows(64, seed=5 + shift), positions))
        for away in (-1, 0, 1):
            assert (mine == np.roll(shifted, away)).mean() < 0.1


# Logits within 3 of each other at temperature 1 or more: every token is likelier than e^-3 / 8 = 0.006.
close_logits = st.permutations(np.linspace(0, 3, VOCAB).tolist()).map(lambda x: np.array(x, np.float32))
temperatures = st.sampled_from([1.0, 1.5, 4.0])


@given(close_logits, temperatures, st.integers(1, VOCAB + 2))
@settings(deadline=None, max_examples=15)
def test_top_k_keeps_exactly_the_k_likeliest(logits, temperature, top_k) -> None:
    counts = drawn(logits, rows(DRAWS, temperature, top_k=top_k))
    assert set(np.flatnonzero(counts)) == set(np.argsort(-logits)[:top_k])


@given(close_logits, temperatures, st.floats(0.05, 1.0))
@settings(deadline=None, max_examples=15)
def test_top_p_keeps_exactly_the_fewest_likeliest_that_reach_p(logits, temperature, top_p) -> None:
    order = np.argsort(-logits)
    reached = np.cumsum(softmax(logits / temperature)[order])
    assume(np.abs(reached[:-1] - top_p).min() > 1e-4)
    kept = int(np.searchsorted(reached[:-1], top_p)) + 1
    counts = drawn(logits, rows(DRAWS, temperature, top_p=top_p))
    assert set(np.flatnonzero(counts)) == set(order[:kept])


@pytest.mark.parametrize("temperature", [0.7, 1.0, 3.0])
@pytest.mark.parametrize("limits", [{}, {"top_k": 5}, {"top_p": 0.8}], ids=str)
def test_frequencies_follow_the_softmax_of_kept_tokens(temperature: float, limits: dict[str, float]) -> None:
    logits = np.linspace(0, 2, VOCAB)[[3, 1, 7, 0, 5, 2, 6, 4]].astype(np.float32)
    p = softmax(logits / temperature)
    order = np.argsort(-p)
    kept = limits.get("top_k") or 1 + int(np.sum(np.cumsum(p[order]) < limits.get("top_p", 1.0 - 1e-9)))
    expected = np.where(np.isin(np.arange(VOCAB), order[:kept]), p, 0)
    expected = expected / expected.sum() * DRAWS
    counts = drawn(logits, rows(DRAWS, temperature, **limits))
    possible = expected > 0
    assert counts[~possible].sum() == 0
    chi_square = np.sum((counts[possible] - expected[possible]) ** 2 / expected[possible])
    assert chi_square < 24.3  # one in a thousand at 7 degrees of freedom, rarer at fewer


def test_positions_of_one_request_draw_independently() -> None:
    """Pairs of neighbours along 4,096 positions of one seed are uniform over the 64 pairs."""
    logits = np.zeros((DRAWS, VOCAB), np.float32)
    tokens = np.asarray(draw(logits, rows(DRAWS, seed=3), np.arange(DRAWS, dtype=np.int32)))
    counts = np.bincount(tokens[0::2] * VOCAB + tokens[1::2], minlength=VOCAB**2)
    expected = DRAWS / 2 / VOCAB**2
    assert np.sum((counts - expected) ** 2 / expected) < 103.5  # one in a thousand at 63 degrees of freedom


def test_top_p_applies_to_tokens_kept_by_top_k() -> None:
    logits = np.log(np.array([0.1, 0.4, 0.2, 0.3], np.float32))
    counts = drawn(logits, rows(DRAWS, top_k=2, top_p=0.5))  # 0.4 of 0.7 alone reaches a half
    assert set(np.flatnonzero(counts)) == {1}
