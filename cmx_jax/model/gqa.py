"""Grouped-query attention. A cached row is every key head, rotated, then every value head.

Prefill and decode attend in the same way: no projection can be absorbed.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from cmx_jax.model.config import GQAConfig, LayerKind, ModelConfig
from cmx_jax.model.layers import add_bias, probabilities, rms_norm, seen_rows
from cmx_jax.model.rope import rotate
from cmx_jax.model.weights import GQA
from cmx_jax.quant import einsum


def prolog(
    x: Float[Array, "B T D"], positions: Int[Array, "B T"], kind: LayerKind, w: GQA, c: ModelConfig
) -> tuple[Float[Array, "B T H N"], Float[Array, "B T C"]]:
    """Returns the queries and the rows `[keys; values]` to be cached."""
    a = _config(c)
    with jax.named_scope("QKV"):
        q = add_bias(einsum("btd,dhn->bthn", x, w.q), w.q_bias)
        k = add_bias(einsum("btd,dyn->btyn", x, w.k), w.k_bias)
        v = add_bias(einsum("btd,dyn->btyn", x, w.v), w.v_bias)
        if a.qk_norm == "weighted":
            q, k = rms_norm(q, w.q_norm, c.rms_norm_eps), rms_norm(k, w.k_norm, c.rms_norm_eps)
        if kind.rope:
            q, k = rotate(q, positions, c.rope), rotate(k, positions, c.rope)
            if a.qk_norm == "l2":
                ones = jnp.ones(a.head_dim, x.dtype)
                q, k = rms_norm(q, ones, c.rms_norm_eps), rms_norm(k, ones, c.rms_norm_eps)
        elif a.temperature_scale:
            q = q * _temperature(positions, a)[:, :, None, None].astype(q.dtype)
        rows = (k.reshape(*k.shape[:2], -1), v.reshape(*v.shape[:2], -1))
        return q, jnp.concatenate(rows, axis=-1)


def _config(c: ModelConfig) -> GQAConfig:
    assert isinstance(c.attention, GQAConfig)
    return c.attention


def _temperature(positions: Int[Array, "B T"], a: GQAConfig) -> Float[Array, "B T"]:
    """Factor of the queries that sharpens the scores of far positions in layers without rotation (Llama 4,
    arXiv 2501.19399)."""
    steps = jnp.floor((positions.astype(jnp.float32) + 1.0) / a.temperature_floor)
    return jnp.log1p(steps) * a.temperature_scale + 1.0


def attend(
    q: Float[Array, "B T H N"],
    rows: Float[Array, "B S C"],
    mask: Bool[Array, "B T S"],
    w: GQA,
    c: ModelConfig,
) -> Float[Array, "B T H N"]:
    """Attention over cached rows. Rows that no query sees may hold anything, NaN included."""
    del w  # keys and values are in the rows
    groups = _config(c).num_key_value_heads
    with jax.named_scope("FusedAttention"):
        rows = seen_rows(rows, mask).astype(q.dtype)
        k, v = (part.reshape(*rows.shape[:2], groups, -1) for part in jnp.split(rows, 2, axis=-1))
        grouped = q.reshape(*q.shape[:2], groups, -1, q.shape[-1])
        scores = jnp.einsum("btygn,bsyn->bygts", grouped, k)
        flat = scores.reshape(q.shape[0], q.shape[2], *scores.shape[3:])
        p = probabilities(flat, mask, c.softmax_scale).astype(v.dtype).reshape(scores.shape)
        return jnp.einsum("bygts,bsyn->btygn", p, v).reshape(q.shape)
