"""INT8 weights on the host: storable scales, rounding, and rows as `quantize_rows` rounds them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from cmx_jax.quant import quantize_rows
from cmx_jax.quant.int8_weights import (
    channel_scale,
    quantize,
    rows_through_int8,
    storable_scale,
    through_int8,
)
from cmx_jax.quant.product_errors import checked, gram, relative, squares

BFLOAT16 = jnp.dtype("bfloat16")
FLOATS = st.floats(-(2.0**100), 2.0**100, width=32).map(lambda v: 0.0 if abs(v) < 2.0**-100 else v)
MATRICES = hnp.arrays(np.float32, st.sampled_from([(1, 1), (7, 3), (4, 33)]), elements=FLOATS)

quick = settings(deadline=None, max_examples=60)
_live = jax.jit(quantize_rows)


@quick
@given(hnp.arrays(np.float32, 5, elements=st.floats(2.0**-126, 2.0**127, width=32)))
def test_storable_scale_is_next_larger_bfloat16(scale: np.ndarray) -> None:
    got = storable_scale(scale)
    stored = got.astype(BFLOAT16)
    np.testing.assert_array_equal(stored.astype(np.float32), got)
    assert (got >= scale).all()
    before = (stored.view(np.uint16) - 1).view(BFLOAT16).astype(np.float32)
    assert (before < scale).all()
    np.testing.assert_array_equal(storable_scale(got), got)


def test_storable_scales_of_zero_and_tiny_numbers() -> None:
    got = storable_scale(np.array([0, 1e-45, 1e-39], np.float32))
    np.testing.assert_array_equal(got, np.array([1, 2.0**-126, 2.0**-126], np.float32))


@pytest.mark.parametrize("bad", [-1.0, np.nan, np.inf, np.finfo(np.float32).max])
def test_scales_that_cannot_be_stored_are_refused(bad: float) -> None:
    with pytest.raises(ValueError, match="scale holds"):
        storable_scale(np.array([1, bad], np.float32))


@quick
@given(MATRICES)
def test_rounding_errors_are_at_most_half_a_step(w: np.ndarray) -> None:
    scale = channel_scale(w)
    q = quantize(w, scale[None])
    assert np.abs(q.astype(int)).max() <= 127
    back = q.astype(np.float64) * scale
    np.testing.assert_array_equal(through_int8(w, scale), back.astype(np.float32))
    assert (np.abs(w - back) <= scale * 0.5001).all()
    # 2^-7 is what rounding up to bfloat16 may cost of the range
    used = np.abs(q.astype(int)).max(axis=0)
    assert (used[w.any(axis=0)] >= 126).all()


def test_weights_beyond_the_scale_are_cut_off() -> None:
    w = np.array([[-1e30, -1.4, 0.5, 1.5, 2.5, 1e30]], np.float32)
    got = quantize(w, np.ones((1, 6), np.float32))
    np.testing.assert_array_equal(got, np.array([[-127, -1, 0, 2, 2, 127]], np.int8))


@quick
@given(MATRICES)
def test_rows_are_rounded_as_the_matmul_rounds_them(x: np.ndarray) -> None:
    q, scale = (np.asarray(a) for a in _live(jnp.asarray(x), jnp.ones(len(x), bool)))
    got = rows_through_int8(x)
    exact = q.astype(np.float64) * scale[:, None]
    # a division may differ in its last bit, and with it where a half is rounded to
    step = np.abs(x).max(axis=1, keepdims=True).astype(np.float64) / 127
    ties = np.abs(np.abs(x / np.where(step > 0, step, 1)) % 1 - 0.5) < 1e-4
    np.testing.assert_array_less(np.abs(got - exact), step * np.where(ties, 1.001, 1e-4) + 2.0**-120)


def test_tiny_rows_become_zeros() -> None:
    x = np.array([[0, 0], [1e-38, -1e-38]], np.float32)
    np.testing.assert_array_equal(rows_through_int8(x), np.zeros_like(x))


def test_bfloat16_weights_are_rounded_as_their_float32_values() -> None:
    w = np.random.default_rng(0).normal(size=(9, 4)).astype(BFLOAT16)
    wide = w.astype(np.float32)
    np.testing.assert_array_equal(channel_scale(w), channel_scale(wide))
    np.testing.assert_array_equal(quantize(w, channel_scale(w)[None]), quantize(wide, channel_scale(w)[None]))


def test_errors_by_the_gram_matrix_are_those_of_the_rows() -> None:
    rng = np.random.default_rng(0)
    x, e = (rng.normal(size=s).astype(np.float32) for s in ((40, 8), (8, 5)))
    exact = np.square(x.astype(np.float64) @ e).sum(axis=0)
    np.testing.assert_allclose(squares(gram(x), e), exact)
    np.testing.assert_allclose(squares(gram(x[:15]) + gram(x[15:]), e), exact)


def test_relative_errors_without_norm() -> None:
    assert relative(4.0, 16.0) == 0.5
    assert relative(0.0, 0.0) == 0.0
    assert relative(1.0, 0.0) == np.inf


def test_entry_that_is_not_finite_is_named() -> None:
    x = np.zeros((3, 4), np.float32)
    x[2, 1] = np.nan
    with pytest.raises(ValueError, match=r"acts \[2, 1\] is nan"):
        checked("acts", x)
