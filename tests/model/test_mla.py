"""Expanded and absorbed attention against a loop over heads and queries in float64."""

from dataclasses import fields

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cmx_jax.model.mla import Query, absorbed, expanded
from cmx_jax.model.weights import MLA
from model.small import config

C = config("yarn_mscale")  # its softmax_scale is not the plain (N + R)^-0.5
B, T, S, H, N, R, V, LATENT = 2, 3, 7, 3, 12, 8, 10, 18
WAYS = pytest.mark.parametrize("attend", [expanded, absorbed])
run = jax.jit(lambda attend, *args: attend(*args, C), static_argnums=0)


class Case:
    """Random queries of the last T of S positions, latents and weights."""

    def __init__(self, seed: int):
        rng = np.random.default_rng(seed)

        def normal(*shape: int) -> np.ndarray:
            return rng.standard_normal(shape).astype(np.float32)

        self.q = Query(normal(B, T, H, N), normal(B, T, H, R))
        self.latents = normal(B, S, LATENT + R)
        scale = np.float32(LATENT**-0.5)
        no_others = dict.fromkeys(field.name for field in fields(MLA))
        self.w = MLA(**no_others | {"k_b": normal(H, N, LATENT) * scale, "v_b": normal(H, V, LATENT) * scale})
        self.mask = np.broadcast_to(np.arange(S) <= np.arange(S - T, S)[:, None], (B, T, S))

    def run(self, attend, **changes) -> np.ndarray:
        args = {"q": self.q, "latents": self.latents, "mask": self.mask, "w": self.w} | changes
        return np.asarray(run(attend, *args.values()))

    def oracle(self) -> np.ndarray:
        """`softmax(q k^T * scale) v` over the positions that each query sees."""
        scale = (N + R) ** -0.5 * (0.1 * 1.3 * np.log(4.0) + 1) ** 2
        arrays = (*self.q, self.latents, self.w.k_b, self.w.v_b)
        nope, rope, latents, k_b, v_b = (x.astype(np.float64) for x in arrays)
        out = np.zeros((B, T, H, V))
        for b, t, h in np.ndindex(B, T, H):
            seen = latents[b, self.mask[b, t]]
            keys = np.concatenate([seen[:, :LATENT] @ k_b[h].T, seen[:, LATENT:]], axis=1)
            scores = keys @ np.concatenate([nope[b, t, h], rope[b, t, h]]) * scale
            p = np.exp(scores - scores.max())
            out[b, t, h] = p / p.sum() @ (seen[:, :LATENT] @ v_b[h].T)
        return out


@WAYS
@given(st.integers(0, 2**32 - 1))
@settings(deadline=None, max_examples=20)
def test_attention_equals_the_loop(attend, seed: int) -> None:
    case = Case(seed)
    np.testing.assert_allclose(case.run(attend), case.oracle(), atol=5e-6, rtol=0)


@given(st.integers(0, 2**32 - 1))
@settings(deadline=None, max_examples=20)
def test_absorbed_equals_expanded(seed: int) -> None:
    case = Case(seed)
    np.testing.assert_allclose(case.run(absorbed), case.run(expanded), atol=5e-6, rtol=0)


@WAYS
def test_query_does_not_see_later_positions(attend) -> None:
    case = Case(0)
    later = case.latents.copy()
    later[:, S - T + 1 :] += 10.0  # after the first query; the others see it
    before, after = case.run(attend), case.run(attend, latents=later)
    np.testing.assert_array_equal(before[:, 0], after[:, 0])
    assert (np.abs(before[:, 1:] - after[:, 1:]).max(axis=(2, 3)) > 0.1).all()


@WAYS
@pytest.mark.parametrize("size", [-1e4, 1e4])
def test_single_visible_row_is_the_result_at_any_score(attend, size: float) -> None:
    case = Case(4)
    case.q = Query(*(x * np.float32(size) for x in case.q))
    case.mask = np.broadcast_to(np.arange(S) == 2, (B, T, S))
    np.testing.assert_allclose(case.run(attend), case.oracle(), atol=5e-6, rtol=0)


@pytest.mark.parametrize("junk", [np.nan, np.inf, -np.inf])
def test_absorbed_ignores_unseen_rows(junk: float) -> None:
    case = Case(1)
    mask = case.mask & (np.arange(S) != 2)
    mask[1, :, 4:] = False
    poisoned = np.where(mask.any(axis=1)[..., None], case.latents, np.float32(junk))
    assert not np.isfinite(poisoned).all()
    clean, dirty = (case.run(absorbed, latents=x, mask=mask) for x in (case.latents, poisoned))
    np.testing.assert_array_equal(dirty, clean)


def test_absorbed_gives_zeros_to_a_query_that_sees_nothing() -> None:
    case = Case(2)
    mask = case.mask & np.array([True, False])[:, None, None]
    case.latents[1] = np.nan
    out = case.run(absorbed, mask=mask)
    np.testing.assert_array_equal(out[1], 0)
    assert np.isfinite(out[0]).all()


def test_absorbed_computes_in_the_type_of_the_query() -> None:
    case = Case(3)
    narrow = jnp.asarray(case.latents, jnp.bfloat16)
    expected = case.run(absorbed, latents=np.asarray(narrow, np.float32))
    np.testing.assert_array_equal(case.run(absorbed, latents=narrow), expected)
