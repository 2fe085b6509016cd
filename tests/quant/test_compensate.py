"""Error compensation against GPTQ as published, against plain rounding, and on singular matrices."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cmx_jax.quant import compensate as module
from cmx_jax.quant.compensate import compensate
from cmx_jax.quant.int8_weights import channel_scale, quantize
from cmx_jax.quant.product_errors import gram, squares

quick = settings(deadline=None, max_examples=25)


def correlated(seed: int, rows: int, inputs: int = 24) -> tuple[np.ndarray, np.ndarray]:
    """Inputs that depend on a third as many hidden ones, and a little on themselves."""
    rng = np.random.default_rng(seed)
    mix = np.random.default_rng(0).normal(size=(inputs // 3, inputs))
    x = rng.normal(size=(rows, inputs // 3)) @ mix + 0.1 * rng.normal(size=(rows, inputs))
    return x.astype(np.float32), np.random.default_rng(1).normal(size=(inputs, 8)).astype(np.float32)


def published(gram: np.ndarray, w: np.ndarray, scale: np.ndarray, damp: float) -> np.ndarray:
    """Algorithm 1 of arXiv 2210.17323 without blocks: each rounding updates all weights that are left."""
    hessian = gram + damp * np.diag(gram).mean() * np.eye(len(gram))
    upper = np.linalg.cholesky(np.linalg.inv(hessian)).T
    w, q = w.astype(np.float64), np.zeros(w.shape)
    for i in range(len(w)):
        q[i] = np.clip(np.rint(w[i] / scale), -127, 127)
        w[i:] -= np.outer(upper[i, i:] / upper[i, i], w[i] - q[i] * scale)
    return q.astype(np.int8)


def errors(x: np.ndarray, w: np.ndarray, q: np.ndarray, scale: np.ndarray) -> np.ndarray:
    return squares(gram(x), w - q * scale.astype(np.float64))


@pytest.mark.parametrize("block", [1, 5, 128])
def test_compensate_equals_gptq(block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_BLOCK", block)
    x, w = correlated(2, 200)
    scale = 8 * channel_scale(w)  # coarse, so that rounding matters
    expected, plain = published(gram(x), w, scale, 0.01), quantize(w, scale[None])
    better = errors(x, w, expected, scale) < errors(x, w, plain, scale)
    assert better.all()
    np.testing.assert_array_equal(compensate(gram(x), w, scale, ordered=False), expected)


def test_ordered_equals_gptq_of_sorted_inputs() -> None:
    x, w = correlated(2, 200)
    scale = channel_scale(w)
    order = np.argsort(-np.diag(gram(x)))
    got = compensate(gram(x), w, scale)
    np.testing.assert_array_equal(got[order], published(gram(x[:, order]), w[order], scale, 0.01))


@pytest.mark.parametrize("ordered", [True, False])
def test_correlated_inputs_gain_on_other_rows_too(ordered: bool) -> None:
    (x, w), (fresh, _) = correlated(2, 400), correlated(3, 400)
    scale = channel_scale(w)
    plain, q = quantize(w, scale[None]), compensate(gram(x), w, scale, ordered=ordered)
    for rows in (x, fresh):
        assert errors(rows, w, q, scale).sum() < 0.3 * errors(rows, w, plain, scale).sum()


@quick
@given(st.integers(0, 2**32), st.integers(0, 40), st.sampled_from([0.5, 1.0, 20.0]))
def test_channels_are_no_worse_than_plain(seed: int, rows: int, coarse: float) -> None:
    x, w = correlated(seed, rows)
    scale = channel_scale(w) * np.float32(coarse)
    plain, q = quantize(w, scale[None]), compensate(gram(x), w, scale)
    assert np.abs(q.astype(int)).max() <= 127
    assert (errors(x, w, q, scale) <= errors(x, w, plain, scale)).all()


def test_judge_rows_detect_overfitting() -> None:
    rng = np.random.default_rng(0)
    x, other, fresh = (rng.normal(size=(rows, 24)).astype(np.float32) for rows in (30, 300, 300))
    _, w = correlated(0, 1)
    scale = channel_scale(w)
    plain = errors(fresh, w, quantize(w, scale[None]), scale).sum()
    fitted = compensate(gram(x), w, scale)
    assert errors(fresh, w, fitted, scale).sum() > 1.2 * plain
    judged = compensate(gram(x), w, scale, judge=gram(other))
    assert errors(fresh, w, judged, scale).sum() < 1.05 * plain


def test_inputs_that_do_not_depend_on_each_other_are_rounded_plainly() -> None:
    _, w = correlated(0, 1)
    for diagonal in (np.ones(24), np.arange(24.0), np.zeros(24)):
        scale = channel_scale(w)
        np.testing.assert_array_equal(compensate(np.diag(diagonal), w, scale), quantize(w, scale[None]))


def test_dead_inputs_are_rounded_plainly_and_change_nothing() -> None:
    x, w = correlated(0, 200)
    x[:, [3, 23]] = 0
    live = np.delete(np.arange(24), [3, 23])
    scale = channel_scale(w)
    q = compensate(gram(x), w, scale)
    np.testing.assert_array_equal(q[[3, 23]], quantize(w, scale[None])[[3, 23]])
    np.testing.assert_array_equal(q[live], compensate(gram(x[:, live]), w[live], scale))


def test_equal_inputs_share_their_error() -> None:
    """`x [t, 0] = x [t, 1]`: what counts is the sum of both weights, which is off by at most half a step."""
    x = np.random.default_rng(0).normal(size=(50, 1)).astype(np.float32) * np.ones((1, 2), np.float32)
    w = np.array([[0.4, 0.3], [0.4, 0.4]], np.float32)
    q = compensate(gram(x), w, np.ones(2, np.float32), damp=1e-6)
    np.testing.assert_array_equal(q.sum(axis=0), [1, 1])


def test_matrix_that_is_not_gram_is_refused() -> None:
    x, w = correlated(0, 50)
    scale = channel_scale(w)
    bad = gram(x)
    bad[3, 4] = np.nan
    with pytest.raises(ValueError, match="gram holds numbers that are not finite"):
        compensate(bad, w, scale)
    with pytest.raises(ValueError, match="not symmetric"):
        compensate(np.triu(gram(x)), w, scale)
    with pytest.raises(ValueError, match="not positive definite"):
        compensate(np.ones((24, 24)) - np.diag(np.full(24, 0.9)), w, scale)


def test_weights_and_scales_with_nan_are_refused() -> None:
    x, w = correlated(0, 50)
    with pytest.raises(ValueError, match="scale"):
        compensate(gram(x), w, np.zeros(8, np.float32))
    w[1, 2] = np.nan
    with pytest.raises(ValueError, match=r"w \[1, 2\]"):
        compensate(gram(x), w, np.ones(8, np.float32))
