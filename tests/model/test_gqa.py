"""Grouped-query attention, masks and PaLM's parallel block against loops in float64."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cmx_jax.model import gqa
from cmx_jax.model.attention import TokenPositions, data_parallel_attention
from cmx_jax.model.config import LayerKind, RopeConfig
from cmx_jax.model.decoder import Stream, layer
from cmx_jax.model.families import parse_config
from cmx_jax.model.layers import layer_norm, visible
from cmx_jax.model.rope import frequencies
from cmx_jax.model.weights import FFN, GQA, Experts, Layer

B, T, S, H, Y, N, D, F = 2, 3, 11, 6, 2, 10, 16, 24
PALM = {
    "model_type": "palm",
    "vocab_size": 32,
    "hidden_size": D,
    "intermediate_size": F,
    "num_hidden_layers": 1,
    "num_attention_heads": H,
    "num_key_value_heads": Y,
    "head_dim": N,
}
C = parse_config(PALM)
attend = jax.jit(lambda *args: gqa.attend(*args, C))


def sees(query: int, key: int, chunk: int | None, window: int | None) -> bool:
    same = chunk is None or query // chunk == key // chunk
    return key <= query and same and (window is None or query - key < window)


@given(
    st.lists(st.integers(-1, 40), min_size=6, max_size=6),
    st.none() | st.integers(1, 9),
    st.none() | st.integers(1, 9),
)
@settings(deadline=None, max_examples=100)
def test_visible_addresses(positions: list[int], chunk: int | None, window: int | None) -> None:
    span = 30
    mask = visible(jnp.array([positions], jnp.int32), span, chunk, window)
    expected = [[sees(q, k, chunk, window) for k in range(span)] for q in positions]
    np.testing.assert_array_equal(
        np.asarray(mask)[0], np.array(expected) & (np.array(positions)[:, None] >= 0)
    )


def normal(rng: np.random.Generator, *shape: int) -> np.ndarray:
    return rng.standard_normal(shape).astype(np.float32)


def oracle(q: np.ndarray, rows: np.ndarray, mask: np.ndarray, groups: int) -> np.ndarray:
    """Every query head by itself, with the key-value head of its group."""
    q, rows = q.astype(np.float64), rows.astype(np.float64)
    batch, tokens, heads, dim = q.shape
    k, v = (part.reshape(batch, -1, groups, dim) for part in np.split(rows, 2, axis=-1))
    out = np.zeros(q.shape)
    for b, t, h in np.ndindex(batch, tokens, heads):
        seen, g = mask[b, t], h * groups // heads
        scores = k[b, seen, g] @ q[b, t, h] / math.sqrt(dim)
        p = np.exp(scores - scores.max())
        out[b, t, h] = p / p.sum() @ v[b, seen, g]
    return out


@given(st.integers(0, 2**32 - 1), st.none() | st.integers(2, 7))
@settings(deadline=None, max_examples=20)
def test_attention_equals_a_loop_and_ignores_unseen_rows(seed: int, chunk: int | None) -> None:
    rng = np.random.default_rng(seed)
    q, rows = normal(rng, B, T, H, N), normal(rng, B, S, 2 * Y * N)
    positions = rng.integers(0, S, (B, T)).astype(np.int32)
    mask = np.asarray(visible(jnp.asarray(positions), S, chunk))
    expected = oracle(q, rows, mask, Y)
    rows = np.where(mask.any(axis=1)[..., None], rows, np.nan).astype(np.float32)
    w = GQA(*[None] * 10)
    np.testing.assert_allclose(np.asarray(attend(q, rows, mask, w)), expected, atol=2e-6, rtol=1e-5)


def test_layer_norm_equals_numpy() -> None:
    rng = np.random.default_rng(0)
    x, weight = normal(rng, 5, D) + 3, normal(rng, D)
    wide = x.astype(np.float64)
    centred = wide - wide.mean(axis=-1, keepdims=True)
    expected = weight * centred / np.sqrt(wide.var(axis=-1, keepdims=True) + 1e-6)
    np.testing.assert_allclose(
        np.asarray(layer_norm(jnp.asarray(x), jnp.asarray(weight), 1e-6)), expected, atol=1e-5, rtol=1e-5
    )


def test_parallel_block_has_one_input_for_attention_and_ffn() -> None:
    """PaLM's `x + attention(norm(x)) + mlp(norm(x))` (arXiv 2204.02311, section 2), at position 0."""
    rng = np.random.default_rng(1)
    attn = GQA(
        q=normal(rng, D, H, N), k=normal(rng, D, Y, N), v=normal(rng, D, Y, N), o=normal(rng, H, N, D),
        **dict.fromkeys(("q_norm", "k_norm", "q_bias", "k_bias", "v_bias", "o_bias")),
    )  # fmt: skip
    ffn = FFN(normal(rng, D, 2, F), normal(rng, F, D))
    w = Layer(normal(rng, D), attn, None, None, ffn, None)
    x = normal(rng, B, 1, D)

    placed, zeros, kind = jax.tree.map(jnp.asarray, w), jnp.zeros((B, 1), jnp.int32), LayerKind(moe=False)
    none, index = Experts(None, None), jnp.int32(0)
    stream = Stream(zeros, zeros == 0, data_parallel_attention(TokenPositions(zeros), 1, C))
    [(y, _, stats)] = layer([jnp.asarray(x)], [stream], placed, kind, none, index, index, C, lambda *_: None)
    h = np.asarray(layer_norm(jnp.asarray(x), placed.attn_norm, C.rms_norm_eps), np.float64)
    value = np.repeat(np.einsum("btd,dyn->btyn", h, attn.v), H // Y, axis=2)
    gate, up = np.moveaxis(np.einsum("btd,dgf->btgf", h, ffn.gate_up), 2, 0)
    mlp = (gate / (1 + np.exp(-gate)) * up) @ ffn.down
    expected = x + np.einsum("bthn,hnd->btd", value, attn.o) + mlp
    np.testing.assert_allclose(np.asarray(y), expected, rtol=1e-4, atol=1e-3)
    assert stats is None


@pytest.mark.parametrize(("low", "high"), [(1.0, 4.0), (2.0, 2.0), (1.0, 1.0)])
def test_llama3_frequencies_by_wavelength(low: float, high: float) -> None:
    """Long waves are stretched, short ones kept, those between blended (Llama 3.1's reference code)."""
    rope = RopeConfig(
        kind="llama3", theta=100.0, factor=8.0, original_max_position_embeddings=64,
        low_freq_factor=low, high_freq_factor=high,
    )  # fmt: skip
    result, scale = frequencies(rope, 16)
    kinds = set()
    for i, frequency in enumerate(result):
        plain = 100.0 ** (-2 * i / 16)
        wave = 2 * math.pi / plain
        if wave < 64 / high:
            expected, kind = plain, "kept"
        elif wave > 64 / low:
            expected, kind = plain / 8, "stretched"
        else:
            smooth = (64 / wave - low) / (high - low)
            expected, kind = (1 - smooth) * plain / 8 + smooth * plain, "blended"
        kinds.add(kind)
        assert frequency == pytest.approx(expected, rel=1e-6)
    assert kinds == {"kept", "stretched", *(["blended"] if high > low else [])}
    assert scale == 1.0
