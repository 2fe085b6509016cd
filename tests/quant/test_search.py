"""Scales for inputs: never worse than none, the best by brute force, and their effect on outliers."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cmx_jax.quant.int8_weights import channel_scale, rows_through_int8, through_int8
from cmx_jax.quant.scale_search import search_scales

quick = settings(deadline=None, max_examples=25)


def product(x: np.ndarray, w: np.ndarray) -> np.ndarray:
    return rows_through_int8(x) @ through_int8(w, channel_scale(w))


def error(x: np.ndarray, weights: list[np.ndarray], s: np.ndarray) -> float:
    exact = np.concatenate([x.astype(np.float64) @ w for w in weights], axis=1)
    got = np.concatenate([product(x / s, w * s[:, None]) for w in weights], axis=1)
    return float(np.linalg.norm(got - exact) / np.linalg.norm(exact))


def planted(seed: int, rows: int = 96, by: float = 100) -> tuple[np.ndarray, list[np.ndarray]]:
    """Two inputs are large for all tokens and have small weights, so that the other inputs lose precision."""
    x = np.random.default_rng(seed).normal(size=(rows, 48))
    x[:, [5, 20]] *= by
    weights = [np.random.default_rng(o).normal(size=(48, o)) for o in (16, 24)]
    for w in weights:
        w[[5, 20]] /= by
    return x.astype(np.float32), [w.astype(np.float32) for w in weights]


@quick
@given(st.integers(0, 2**32), st.sampled_from([1.0, 10.0, 300.0]), st.sampled_from([1, 2, 40]), st.booleans())
def test_never_worse_than_no_scales(seed: int, by: float, rows: int, power_of_two: bool) -> None:
    x, weights = planted(seed, rows, by)
    got = search_scales(x, weights, points=4, power_of_two=power_of_two)
    assert got.after <= got.before
    np.testing.assert_allclose(got.before, error(x, weights, np.ones(48, np.float32)), rtol=1e-3)
    np.testing.assert_allclose(got.after, error(x, weights, got.s), rtol=1e-3)
    assert np.isfinite(got.s).all()
    assert (got.s > 0).all()


def test_scales_find_outliers_and_serve_other_rows() -> None:
    (x, weights), (fresh, _) = planted(0), planted(1)
    got = search_scales(x, weights)
    assert got.s[[5, 20]].min() > 5 * np.delete(got.s, [5, 20]).max()
    assert error(fresh, weights, got.s) < 0.1 * error(fresh, weights, np.ones(48, np.float32))


def test_search_finds_best_exponent() -> None:
    """One weight, all of it the same: candidates are powers of the largest activations, up to a factor."""
    x, _ = planted(0)
    w, grid = np.ones((48, 4), np.float32), np.linspace(0, 1, 11)

    def mean_one(s: np.ndarray) -> np.ndarray:
        return (s / np.exp(np.log(s).mean())).astype(np.float32)

    def of_half(i: int, a: float) -> float:
        s, rows = mean_one(np.abs(x[1 - i :: 2]).max(axis=0) ** a), x[i::2]
        return float(np.square(product(rows / s, w * s[:, None]) - rows.astype(np.float64) @ w).sum())

    best = grid[np.argmin([of_half(0, a) + of_half(1, a) for a in grid])]
    assert 0 < best < 1
    got = search_scales(x, [w], points=10).s
    np.testing.assert_allclose(got, mean_one(np.abs(x).max(axis=0) ** best), rtol=1e-4)


def test_powers_of_two_only() -> None:
    x, weights = planted(0)
    got = search_scales(x, weights, power_of_two=True)
    np.testing.assert_array_equal(np.frexp(got.s)[0], np.full(48, 0.5, np.float32))
    assert got.after < 0.1 * got.before


def test_inputs_that_are_never_seen_or_never_read_keep_one() -> None:
    x, weights = planted(0)
    x[:, 3], x[:, 4] = 0, 1e-30
    for w in weights:
        w[7] = 0
    got = search_scales(x, weights)
    np.testing.assert_array_equal(got.s[[3, 7]], np.ones(2, np.float32))
    assert got.after < got.before
    assert np.abs(np.log2(got.s)).max() <= 12


@pytest.mark.parametrize("rows", [0, 3])
def test_search_without_signal_gives_no_scales(rows: int) -> None:
    got = search_scales(np.zeros((rows, 4), np.float32), [np.ones((4, 2), np.float32)])
    np.testing.assert_array_equal(got.s, np.ones(4, np.float32))
    assert got.before == got.after == 0.0


def test_rows_that_do_not_depend_on_inputs_are_left_alone() -> None:
    """Heavy tails without outlier channels: maxima are chance, scales by them would serve only these rows."""
    rng = np.random.default_rng(0)
    x = rng.standard_t(3, size=(128, 48)).astype(np.float32)
    fresh = rng.standard_t(3, size=(512, 48)).astype(np.float32)
    weights = [rng.normal(size=(48, 32)).astype(np.float32)]
    s = search_scales(x, weights).s
    assert error(fresh, weights, s) < 1.05 * error(fresh, weights, np.ones(48, np.float32))


@pytest.mark.parametrize("matrix", ["x", "weights"])
def test_nan_is_named(matrix: str) -> None:
    x, weights = planted(0)
    (x if matrix == "x" else weights[1])[2, 3] = np.nan
    with pytest.raises(ValueError, match=r"x \[2, 3\] is nan" if matrix == "x" else r"weights\[1\] \[2, 3\]"):
        search_scales(x, weights)
