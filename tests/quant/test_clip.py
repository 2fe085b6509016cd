"""Clipping: never worse than none, by brute force the best, the same from rows as from their Gram matrix."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cmx_jax.quant import clip
from cmx_jax.quant.clip import ALPHAS, search_clip
from cmx_jax.quant.int8_weights import channel_scale, storable_scale, through_int8

quick = settings(deadline=None, max_examples=25)


def heavy(seed: int, rows: int, outputs: int = 6) -> tuple[np.ndarray, np.ndarray]:
    """Inputs of unequal size; a large weight in each output channel, at an input that is seldom seen."""
    rng = np.random.default_rng(0)
    w, size = rng.normal(size=(24, outputs)), np.exp(rng.normal(size=24))
    w[0], size[0] = 6, 0.01
    x = np.random.default_rng(seed).normal(size=(rows, 24)) * size
    return x.astype(np.float32), w.astype(np.float32)


def errors(x: np.ndarray, w: np.ndarray, scale: np.ndarray) -> np.ndarray:
    return np.square(x.astype(np.float64) @ (w - through_int8(w, scale))).sum(axis=0)


@quick
@given(st.integers(0, 2**32), st.sampled_from([0, 1, 9, 60]), st.sampled_from([1, 2, 4, 100]))
def test_never_worse_than_no_clipping(seed: int, rows: int, block: int) -> None:
    x, w = heavy(seed, rows)
    got = search_clip(x, w, block=block)
    assert got.after <= got.before
    np.testing.assert_array_equal(got.scale, storable_scale(np.abs(w).max(axis=0) / 127 * got.alpha))
    before, after = (errors(x, w, s).sum() for s in (channel_scale(w), got.scale))
    assert after <= before * (1 + 1e-6)
    if rows:
        norm = np.square(x.astype(np.float64) @ w).sum()
        np.testing.assert_allclose((got.before, got.after), np.sqrt([before / norm, after / norm]), rtol=1e-4)
    for start in range(0, 6, block):
        assert len(set(got.alpha[start : start + block].tolist())) == 1


@pytest.mark.parametrize("rows", [10, 100])
def test_channels_get_their_best_alpha(rows: int) -> None:
    x, w = heavy(3, rows)
    tried = np.array([1.0, *ALPHAS])
    table = [errors(x, w, storable_scale(np.abs(w).max(axis=0) / 127 * np.float32(a))) for a in tried]
    got = search_clip(x, w)
    np.testing.assert_array_equal(got.alpha, tried[np.argmin(table, axis=0)].astype(np.float32))
    assert got.after < 0.7 * got.before


def test_channels_searched_in_parts_are_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    x, w = heavy(0, 50, outputs=11)
    at_once = search_clip(x, w, block=2)
    monkeypatch.setattr(clip, "_CHANNELS", 4)
    for got, expected in zip(search_clip(x, w, block=2), at_once, strict=True):
        np.testing.assert_allclose(got, expected)


def test_clipping_serves_other_rows() -> None:
    (x, w), (fresh, _) = heavy(0, 100), heavy(1, 100)
    scale = search_clip(x, w).scale
    assert errors(fresh, w, scale).sum() < 0.6 * errors(fresh, w, channel_scale(w)).sum()


def test_zeros_have_scale_one() -> None:
    got = search_clip(np.ones((3, 4), np.float32), np.zeros((4, 2), np.float32))
    np.testing.assert_array_equal(got.scale, np.ones(2, np.float32))
    np.testing.assert_array_equal(got.alpha, np.ones(2, np.float32))
    assert got.before == got.after == 0.0


@pytest.mark.parametrize("rows", [2, 40])
def test_nan_is_named(rows: int) -> None:
    x, w = heavy(0, rows)
    x[1, 2] = np.inf
    with pytest.raises(ValueError, match=r"x \[1, 2\] is inf"):
        search_clip(x, w)


@pytest.mark.parametrize(("alphas", "block"), [((0.0,), 1), ((1.5,), 1), ((0.9,), 0)])
def test_wrong_alphas_and_blocks_are_refused(alphas: tuple[float, ...], block: int) -> None:
    with pytest.raises(ValueError, match="expected block"):
        search_clip(*heavy(0, 4), alphas=alphas, block=block)
