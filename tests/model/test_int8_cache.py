"""Pages of INT8 rows: their bytes, their moves, and attention over what they stand for."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cmx_jax.model import cache as paged
from cmx_jax.model import gqa, mla
from cmx_jax.model.attention import TokenPositions, data_parallel_attention
from cmx_jax.model.cache import NO_PAGE, PagedCache, Rows, abstract_cache
from cmx_jax.model.config import MLAConfig, ModelConfig
from cmx_jax.model.families import preset
from cmx_jax.quant.rows import Int8Rows
from model.small import config, random_weights

B, S, OLD, WIDTH, PAGES = 2, 11, 8, 4, 9  # tokens of a sequence, of which so many lie in pages
TABLE = np.array([[7, 2, 4], [0, 8, 1]], np.int32)
write, read, take, put = (jax.jit(f) for f in (paged.write, paged.read, paged.take_pages, paged.put_pages))


def junk(c: ModelConfig) -> PagedCache:
    """Pages that were never written: rows that are not zeros, scales that are NaN."""
    shapes = abstract_cache(c, PAGES, WIDTH, "int8").pages
    return PagedCache(
        Int8Rows(np.full(shapes.q.shape, -77, np.int8), np.full(shapes.scale.shape, np.nan, np.float32))
    )


@pytest.mark.parametrize(
    "name", ["deepseek-r1", "openpangu-ultra-moe-718b", "qwen3-235b-a22b", "llama4-scout"]
)
def test_int8_cache_is_half_of_bfloat16(name: str) -> None:
    c = preset(name)
    sizes = {}
    for kv in ("int8", "bfloat16"):
        arrays = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), abstract_cache(c, 1, 16, kv))
        sizes[kv] = sum(a.nbytes for a in jax.tree.leaves(arrays)) / (16 * c.num_hidden_layers)
    assert sizes == {"int8": c.row_dim + 4 * len(c.row_parts), "bfloat16": 2 * c.row_dim}
    assert sizes["int8"] / sizes["bfloat16"] <= 0.53
    if isinstance(c.attention, MLAConfig):
        assert sizes == {"int8": 576 + 8, "bfloat16": 1152}


def test_rows_and_scales_move_together() -> None:
    c, rng = config(), np.random.default_rng(0)
    x = rng.standard_normal((c.num_hidden_layers, B, OLD, c.row_dim)).astype(np.float32)
    rows = paged.encode_rows(jnp.asarray(x), "int8", c)
    addresses = np.broadcast_to(np.arange(OLD, dtype=np.int32), (B, OLD))
    cache = write(junk(c), TABLE, np.where(addresses == 3, -1, addresses), rows)
    written = addresses[0] != 3
    for layer in range(c.num_hidden_layers):
        cached = read(cache, layer, TABLE)
        for part, kept, empty in ((cached.q, rows.q, -77), (cached.scale, rows.scale, np.nan)):
            np.testing.assert_array_equal(part[:, :OLD][:, written], kept[layer][:, written])
            np.testing.assert_array_equal(part[:, 3], empty)
            np.testing.assert_array_equal(part[:, OLD:], empty)
    moved = put(junk(c), np.array([5, NO_PAGE, 3], np.int32), take(cache, np.array([7, 2, 0], np.int32)))
    for new, old in zip(jax.tree.leaves(moved.pages), jax.tree.leaves(cache.pages), strict=True):
        np.testing.assert_array_equal(new[np.array([5, 3])], old[np.array([7, 0])])
    absent = read(cache, 0, np.full((1, 1), NO_PAGE, np.int32))
    np.testing.assert_array_equal(paged.decode_rows(absent, np.dtype(np.float32), c), 0)


class Case:
    """One attention layer with random weights, and hidden states of whole sequences."""

    def __init__(self, name: str):
        self.c, rng = config(name), np.random.default_rng(1)
        weights = random_weights(self.c, mtp=False)
        stack = weights.moe if weights.dense is None else weights.dense
        self.w = jax.tree.map(lambda a: jnp.asarray(a[0] * np.float32(0.25)), stack.attn)
        self.h = rng.standard_normal((B, S, self.c.hidden_size)).astype(np.float32)
        self.kind = self.c.layers[0]
        self.positions = jnp.broadcast_to(jnp.arange(S, dtype=jnp.int32), (B, S))

    def at_once(self, kv_dtype: str | None = "int8") -> tuple[Any, Rows]:
        """Attention of all tokens in one step that reads no pages."""

        def step(w: Any, h: Any) -> Any:
            positions = TokenPositions(self.positions)
            attend = data_parallel_attention(positions, S, self.c, kv_dtype=kv_dtype)
            return attend(jnp.int32(0), self.kind, h, w)

        return jax.jit(step)(self.w, self.h)

    def in_two_steps(self, cache: PagedCache, absorbed: bool) -> tuple[Any, Rows]:
        """Attention of the last tokens to pages that hold the others."""

        def step(w: Any, h: Any, cache: PagedCache) -> Any:
            positions, span = TokenPositions(self.positions[:, OLD:]), TABLE.shape[1] * WIDTH
            attend = data_parallel_attention(
                positions,
                span,
                self.c,
                lambda n: paged.read(cache, n, jnp.asarray(TABLE)),
                absorbed,
                kv_dtype=cache.dtype,
            )
            return attend(jnp.int32(0), self.kind, h, w)

        return jax.jit(step)(self.w, self.h[:, OLD:], cache)

    def oracle(self, cache: PagedCache) -> np.ndarray:
        """Attention of all tokens to the dequantised rows of the pages, [B, S, D], in float64."""
        pages, c, a = jax.device_get(cache.pages), self.c, self.c.attention
        wide = pages.q.astype(np.float64) * np.repeat(pages.scale, c.row_parts, axis=-1)
        rows = wide[TABLE, 0].reshape(B, -1, c.row_dim)[:, :S]
        w = jax.tree.map(lambda x: np.asarray(x, np.float64), self.w)
        module = mla if isinstance(a, MLAConfig) else gqa
        q, _ = module.prolog(jnp.asarray(self.h), self.positions, self.kind, self.w, c)
        if isinstance(a, MLAConfig):
            latent, key = np.split(rows, [a.kv_lora_rank], axis=-1)
            k, v = np.einsum("bsa,hna->bshn", latent, w.k_b), np.einsum("bsa,hva->bshv", latent, w.v_b)
            k = np.concatenate([k, np.repeat(key[:, :, None], k.shape[2], axis=2)], axis=-1)
            q = np.concatenate(q, axis=-1)
        else:
            k, v = (part.reshape(B, S, a.num_key_value_heads, -1) for part in np.split(rows, 2, axis=-1))
            k, v = (np.repeat(x, c.num_attention_heads // a.num_key_value_heads, axis=2) for x in (k, v))
        scores = np.einsum("bthn,bshn->bhts", np.asarray(q, np.float64), k) * c.softmax_scale
        p = np.exp(np.where(np.tri(S, dtype=bool), scores, -np.inf))
        out = np.einsum("bhts,bshv->bthv", p / p.sum(-1, keepdims=True), v)
        return np.einsum("bthv,hvd->btd", out, w.o) + (0 if w.o_bias is None else w.o_bias)


@pytest.mark.parametrize("name", ["yarn_mscale", "no_q_lora", "qwen3_bias", "qwen3_mqa"])
@pytest.mark.slow
def test_step_attends_to_its_own_rows_as_quantised(name: str) -> None:
    case = Case(name)
    out, rows = case.at_once()
    first = jax.tree.map(lambda a: jnp.asarray(a)[None], rows)
    cache = write(junk(case.c), TABLE, case.positions, first)
    expected = case.oracle(cache)
    scale = np.abs(expected).max()
    np.testing.assert_allclose(out, expected, atol=1e-5 * scale, rtol=0)
    old = jax.tree.map(lambda a: a[:, :, :OLD], first)
    cache = write(junk(case.c), TABLE, case.positions[:, :OLD], old)
    for absorbed in (False, True):
        out, new = case.in_two_steps(cache, absorbed)
        steps = np.asarray(new.q, np.int32) - np.asarray(rows.q[:, OLD:], np.int32)
        assert np.abs(steps).max() <= 1  # where float32 sums in another order
        every = write(cache, TABLE, case.positions[:, OLD:], jax.tree.map(lambda a: a[None], new))
        np.testing.assert_allclose(out, case.oracle(every)[:, OLD:], atol=1e-5 * scale, rtol=0)
    exact = case.at_once(None)[0]
    assert np.abs(expected - exact).max() > 1e-4 * scale  # a cache of all digits shows
