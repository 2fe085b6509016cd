"""Rank-coded arrays: each element tells its rank and position."""

import jax.numpy as jnp
import numpy as np
import pytest

from cmx_jax.errors import CmxError
from cmx_jax.testing import rank_coded, where_from


@pytest.mark.parametrize("dtype", [np.float32, np.int32, jnp.bfloat16])
def test_coded_elements_tell_rank_and_position(dtype: type) -> None:
    coded = rank_coded(5, (2, 3), dtype)
    assert coded.shape == (10, 3)
    assert coded.dtype == dtype
    ranks, positions = where_from(coded, (2, 3))
    np.testing.assert_array_equal(ranks.reshape(5, 6), np.arange(5)[:, None].repeat(6, 1))
    np.testing.assert_array_equal(positions.reshape(5, 6), np.arange(6)[None].repeat(5, 0))
    assert where_from(np.zeros(1), (2, 3))[0] == -1


@pytest.mark.parametrize(("dtype", "exact"), [(jnp.bfloat16, 256), (np.float16, 2048), (np.int8, 127)])
def test_coded_type_too_narrow_is_refused(dtype: type, exact: int) -> None:
    assert len(np.unique(rank_coded(1, (exact,), dtype))) == exact
    with pytest.raises(CmxError, match=f"whole numbers up to {exact} apart"):
        rank_coded(exact + 1, (1,), dtype)
