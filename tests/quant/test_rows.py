"""INT8 rows of several parts: each part is rounded by its own largest number."""

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cmx_jax.quant.rows import dequantize_parts, quantize_parts

FLOAT32 = np.dtype(np.float32)
WIDTHS = st.sampled_from([(1,), (33,), (16, 8), (3, 1, 5), (6,) * 4])
quantize = jax.jit(quantize_parts, static_argnums=1)
dequantize = jax.jit(dequantize_parts, static_argnums=(1, 2))


def spread(scale: np.ndarray, widths: tuple[int, ...]) -> np.ndarray:
    """Repeats the number of each part for its columns."""
    return np.repeat(scale, widths, axis=-1)


@given(WIDTHS, st.integers(0, 2**32 - 1))
@settings(deadline=None, max_examples=40)
def test_error_is_at_most_half_a_step_of_the_part(widths, seed: int) -> None:
    rng = np.random.default_rng(seed)
    sizes = spread(10.0 ** rng.uniform(-3, 3, (2, 3, len(widths))), widths)
    x = (rng.standard_normal(sizes.shape) * sizes).astype(np.float32)
    rows = jax.device_get(quantize(x, widths))
    assert rows.q.dtype == np.int8
    assert (rows.q.shape, rows.scale.shape) == (x.shape, (2, 3, len(widths)))
    error = np.abs(np.asarray(dequantize(rows, widths, FLOAT32)) - x)
    assert (error <= spread(rows.scale, widths) * (0.5 + 1e-4)).all()
    largest = np.stack([np.abs(p).max(-1) for p in np.split(x, np.cumsum(widths)[:-1], axis=-1)], axis=-1)
    np.testing.assert_array_max_ulp(rows.scale, largest / np.float32(127), 1)


def test_rounded_rows_are_not_rounded_again() -> None:
    x = np.random.default_rng(0).standard_normal((5, 12)).astype(np.float32)
    once = dequantize(quantize(x, (8, 4)), (8, 4), FLOAT32)
    twice = dequantize(quantize(once, (8, 4)), (8, 4), FLOAT32)
    np.testing.assert_allclose(twice, once, rtol=1e-6, atol=0)


@pytest.mark.parametrize("junk", [np.nan, np.inf])
def test_nan_and_infinity_do_not_change_other_parts(junk: float) -> None:
    x = np.ones((2, 12), np.float32)
    x[0, 8:] = junk
    rows = np.asarray(dequantize(quantize(x, (8, 4)), (8, 4), FLOAT32))
    np.testing.assert_array_equal(rows[0, :8], rows[1, :8])
    np.testing.assert_allclose(rows[1], 1, rtol=1e-6, atol=0)
