"""Multi-head latent attention: expanded (prefill) and absorbed (decode), equal in values.

Expanded rebuilds every head's keys and values from the latents: fewer operations when many new tokens
share them. Absorbed moves the `k_b` and `v_b` projections onto the query and the output, and attends over
the latents themselves: what is read per cached token is `C + R` numbers instead of `H (N + R + V)`.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from cmx_jax.model.config import ModelConfig
from cmx_jax.model.layers import rms_norm
from cmx_jax.model.rope import rotate
from cmx_jax.model.weights import Attention

LATENT_NORM_EPS = 1e-6  # of the two latent norms, whatever rms_norm_eps says (as in DeepSeek's own code)


class Query(NamedTuple):
    nope: Float[Array, "B T H N"]
    rope: Float[Array, "B T H R"]


def prolog(
    x: Float[Array, "B T D"], positions: Int[Array, "B T"], w: Attention, c: ModelConfig
) -> tuple[Query, Float[Array, "B T C"]]:
    """MLAProlog (section 4.2.2): queries, and the latents `[normed kv latent; rotated key]` to be cached."""
    with jax.named_scope("MLAProlog"):
        q = x
        if w.q_a is not None:
            q = _biased(jnp.einsum("btd,dq->btq", x, w.q_a), w.q_a_bias)
            q = rms_norm(q, w.q_norm, LATENT_NORM_EPS)
        q = jnp.einsum("btq,qhn->bthn", q, w.q_b)
        nope, rope = jnp.split(q, [c.qk_nope_head_dim], axis=-1)
        kv = _biased(jnp.einsum("btd,dc->btc", x, w.kv_a), w.kv_a_bias)
        latent, key = jnp.split(kv, [c.kv_lora_rank], axis=-1)
        latent = rms_norm(latent, w.kv_norm, LATENT_NORM_EPS)
        key = rotate(key[:, :, None], positions, c.rope, c.rope_interleave)[:, :, 0]
        query = Query(nope, rotate(rope, positions, c.rope, c.rope_interleave))
        return query, jnp.concatenate([latent, key], axis=-1)


def _biased(x: Array, bias: Array | None) -> Array:
    return x if bias is None else x + bias[None, None]


def _probabilities(
    scores: Float[Array, "B H T S"], mask: Bool[Array, "B T S"], c: ModelConfig
) -> Float[Array, "B H T S"]:
    scores = scores.astype(jnp.float32) * c.softmax_scale
    scores = jnp.where(mask[:, None], scores, jnp.finfo(jnp.float32).min)
    return jax.nn.softmax(scores, axis=-1)


def expanded(
    q: Query, latents: Float[Array, "B S C"], mask: Bool[Array, "B T S"], w: Attention, c: ModelConfig
) -> Float[Array, "B T H V"]:
    """Attention over keys and values rebuilt from the latents. Every row of `latents` must be finite."""
    with jax.named_scope("FusedAttention"):
        latent, key = jnp.split(latents, [c.kv_lora_rank], axis=-1)
        k = jnp.einsum("bsc,hnc->bhsn", latent, w.k_b)
        v = jnp.einsum("bsc,hvc->bhsv", latent, w.v_b)
        shared = jnp.broadcast_to(
            key[:, None], (*k.shape[:3], key.shape[-1])
        )  # one rotated key for all heads
        query, k = jnp.concatenate(q, axis=-1), jnp.concatenate([k, shared], axis=-1)
        p = _probabilities(jnp.einsum("bthn,bhsn->bhts", query, k), mask, c).astype(v.dtype)
        return jnp.einsum("bhts,bhsv->bthv", p, v)


def absorbed(
    q: Query, latents: Float[Array, "B S C"], mask: Bool[Array, "B T S"], w: Attention, c: ModelConfig
) -> Float[Array, "B T H V"]:
    """Attention in latent space. Rows that no query sees may hold anything, NaN included."""
    with jax.named_scope("FusedAttention"):
        seen = jnp.any(mask, axis=1)
        latents = jnp.where(seen[..., None], latents, jnp.zeros((), latents.dtype)).astype(q.nope.dtype)
        lifted = jnp.einsum("bthn,hnc->bthc", q.nope, w.k_b)
        query = jnp.concatenate([lifted, q.rope], axis=-1)
        scores = jnp.einsum("bthc,bsc->bhts", query, latents)
        p = _probabilities(scores, mask, c).astype(latents.dtype)
        out = jnp.einsum("bhts,bsc->bthc", p, latents[..., : c.kv_lora_rank])
        return jnp.einsum("bthc,hvc->bthv", out, w.v_b)


def project_out(out: Float[Array, "B T H V"], w: Attention) -> Float[Array, "B T D"]:
    """O_proj."""
    with jax.named_scope("O_proj"):
        return _biased(jnp.einsum("bthv,hvd->btd", out, w.o), w.o_bias)
