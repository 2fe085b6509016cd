"""Guarantees of `quantize_rows`, against NumPy in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from cmx_jax.quant import dequantize, quantize_rows

SHAPES = st.sampled_from([(1, 1), (3, 4), (4, 33)])
NUMBERS = st.floats(-(2.0**100), 2.0**100, width=32).map(lambda v: 0.0 if abs(v) < 2.0**-100 else v)
WILD = st.floats(width=32, allow_nan=True, allow_infinity=True)
ROUNDING = 127 * 2.0**-23  # x times the rounded inverse of a scale, in units of the scale

quick = settings(deadline=None, max_examples=60)
_quantize = jax.jit(quantize_rows)


def rows(elements: st.SearchStrategy[float] = NUMBERS) -> st.SearchStrategy[np.ndarray]:
    return SHAPES.flatmap(lambda shape: hnp.arrays(np.float32, shape, elements=elements))


def quantize(x: np.ndarray, valid: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
    mask = np.ones(len(x), bool) if valid is None else valid
    q, scale = _quantize(jnp.asarray(x), jnp.asarray(mask))
    return np.asarray(q), np.asarray(scale)


@quick
@given(rows())
def test_scale_is_the_largest_magnitude_over_127(x: np.ndarray) -> None:
    _, scale = quantize(x)
    np.testing.assert_array_max_ulp(scale, np.abs(x).max(1) / np.float32(127), 1)


@quick
@given(rows())
def test_error_is_at_most_half_a_scale(x: np.ndarray) -> None:
    q, scale = (a.astype(np.float64) for a in quantize(x))
    assert (np.abs(x - q * scale[:, None]) <= scale[:, None] * (0.5 + ROUNDING)).all()


@quick
@given(rows())
def test_row_maximum_becomes_127_and_none_minus_128(x: np.ndarray) -> None:
    q, _ = quantize(x)
    np.testing.assert_array_equal(np.abs(q.astype(int)).max(1), np.where(x.any(1), 127, 0))


@quick
@given(rows())
def test_negation_is_exact(x: np.ndarray) -> None:
    (q, scale), (negative, same) = quantize(x), quantize(-x)
    np.testing.assert_array_equal(negative, -q)
    np.testing.assert_array_equal(same, scale)


@quick
@given(hnp.arrays(np.int8, (3, 17), elements=st.integers(-127, 127)), st.integers(-60, 60))
def test_integers_times_a_power_of_two_come_back_exactly(q: np.ndarray, exponent: int) -> None:
    q[:, 0] = 127
    x = np.ldexp(q.astype(np.float32), exponent)
    got, scale = quantize(x)
    np.testing.assert_array_equal(got, q)
    np.testing.assert_array_equal(scale, np.float32(2.0**exponent))
    back = dequantize(jnp.asarray(got), jnp.asarray(scale), jnp.dtype("float32"))
    np.testing.assert_array_equal(back, x)


@quick
@given(rows(), st.data())
def test_invalid_rows_give_zeros_whatever_they_hold(x: np.ndarray, data: st.DataObject) -> None:
    valid = data.draw(hnp.arrays(bool, len(x)))
    stale = data.draw(hnp.arrays(np.float32, x.shape, elements=WILD))
    (q, scale), (alone, alone_scale) = quantize(np.where(valid[:, None], x, stale), valid), quantize(x)
    np.testing.assert_array_equal(q, np.where(valid[:, None], alone, 0))
    np.testing.assert_array_equal(scale, np.where(valid, alone_scale, 0))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@quick
@given(
    hnp.arrays(np.int8, (3, 5), elements=st.integers(-127, 127)), hnp.arrays(np.float32, 3, elements=NUMBERS)
)
def test_dequantize_multiplies_in_float32_and_rounds_once(dtype: str, q: np.ndarray, s: np.ndarray) -> None:
    got = dequantize(jnp.asarray(q), jnp.asarray(s), jnp.dtype(dtype))
    assert got.dtype == jnp.dtype(dtype)
    expected = (q.astype(np.float32) * s[:, None]).astype(jnp.dtype(dtype))
    np.testing.assert_array_equal(np.asarray(got), expected)


def test_bfloat16_rows_are_quantised_as_their_float32_values() -> None:
    x = np.random.default_rng(0).normal(size=(4, 33)).astype(jnp.bfloat16)
    for got, expected in zip(quantize(x), quantize(x.astype(np.float32)), strict=True):
        np.testing.assert_array_equal(got, expected)
