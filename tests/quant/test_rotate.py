"""Rotations: orthogonal, function-preserving, and the end of outliers."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cmx_jax.quant.int8_weights import channel_scale, rows_through_int8, through_int8
from cmx_jax.quant.rotate import (
    fold_norm,
    hadamard,
    rotate_inputs,
    rotate_outputs,
    rotation,
)
from cmx_jax.quant.scale_search import search_scales

quick = settings(deadline=None, max_examples=25)
KNOWN = [1, 2, 4, 8, 12, 20, 24, 28, 36, 40, 44, 48, 60, 64, 76, 192, 224, 288, 576]


@pytest.mark.parametrize("n", KNOWN)
def test_hadamard_matrices(n: int) -> None:
    h = hadamard(n).astype(int)
    np.testing.assert_array_equal(np.abs(h), np.ones((n, n), int))
    np.testing.assert_array_equal(h @ h.T, n * np.eye(n, dtype=int))


@pytest.mark.parametrize("n", [0, -4, 3, 6, 7, 30, 92])
def test_sizes_without_a_known_hadamard_matrix_are_refused(n: int) -> None:
    with pytest.raises(ValueError, match=f"of {n} rows"):
        hadamard(n)


@quick
@given(st.integers(1, 70), st.integers(0, 2**32))
def test_rotations_are_orthogonal_and_repeatable(n: int, seed: int) -> None:
    r = rotation(n, seed)
    np.testing.assert_allclose(r @ r.T, np.eye(n), atol=1e-12)
    np.testing.assert_array_equal(r, rotation(n, seed))
    if n > 4:
        assert (r != rotation(n, seed + 1)).any()


def test_rotation_of_size_zero_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one"):
        rotation(0)


def test_rotation_passes_norm_and_two_matrices() -> None:
    """Rotated outputs are read rotated: `norm(x r) r^T (weight w)` is `(norm(x) * weight) w`."""
    rng = np.random.default_rng(0)
    x, before, weight, w = (rng.normal(size=s) for s in ((5, 6), (6, 12), (12,), (12, 7)))
    r = rotation(12)

    def norm(v: np.ndarray) -> np.ndarray:
        return v / np.sqrt(np.square(v).mean(axis=1, keepdims=True) + 1e-6)

    expected = (norm(x @ before) * weight) @ w
    rotated = norm(x @ rotate_outputs(before, r)) @ rotate_inputs(fold_norm(weight, w), r)
    np.testing.assert_allclose(rotated, expected, rtol=1e-10)


@quick
@given(st.sampled_from([64, 96, 30]), st.integers(0, 2**32))
def test_rotation_spreads_outlier_over_all(n: int, seed: int) -> None:
    x = np.zeros((1, n), np.float32)
    x[0, seed % n] = 100
    limit = 1 + 1e-5 if n != 30 else 4.5  # of what each would have if all were alike
    assert np.abs(x @ rotation(n, seed)).max() < limit * 100 / np.sqrt(n)


@pytest.mark.parametrize("small", [1.0, 0.01])
def test_rotation_and_search_recover_what_planted_outliers_cost(small: float) -> None:
    """Three inputs a hundred times the others, and their weights as all weights or as much smaller."""
    rng = np.random.default_rng(0)
    outliers = np.isin(np.arange(96), [2, 50, 51])
    x, fresh = (rng.normal(size=(128, 96)) * np.where(outliers, 100, 1) for _ in range(2))
    w = rng.normal(size=(96, 40)) * np.where(outliers, small, 1)[:, None]

    def error(s: np.ndarray, r: np.ndarray) -> float:
        rows, weights = (fresh / s @ r).astype(np.float32), r.T @ (w * s[:, None])
        got = rows_through_int8(rows) @ through_int8(weights, channel_scale(weights))
        return float(np.linalg.norm(got - fresh @ w) / np.linalg.norm(fresh @ w))

    s, r = search_scales(x.astype(np.float32), [w]).s, rotation(96)
    one, same = np.ones(96), np.eye(96)
    plain, searched, rotated, combined = error(one, same), error(s, same), error(one, r), error(s, r)
    assert rotated < plain / 2
    assert searched < plain / (2 if small == 1 else 25)
    assert combined < min(plain / 5, 1.2 * searched)
