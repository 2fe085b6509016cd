"""Multi-head latent attention: expanded (prefill) and absorbed (decode), equal in values.

Expanded rebuilds every head's keys and values from the latents: fewer operations when many new tokens share
them. Absorbed applies the `k_b` and `v_b` projections to the query and the output, and attends over the
latents themselves: it reads `C = A + R` numbers per cached token instead of `H (N + R + V)`.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from cmx_jax.model.config import LayerKind, MLAConfig, ModelConfig
from cmx_jax.model.layers import add_bias, probabilities, rms_norm, seen_rows
from cmx_jax.model.rope import rotate
from cmx_jax.model.weights import MLA
from cmx_jax.quant import einsum


class Query(NamedTuple):
    """Queries of all heads, the rotated part apart."""

    nope: Float[Array, "B T H N"]
    rope: Float[Array, "B T H R"]


def down(
    x: Float[Array, "B T D"], positions: Int[Array, "B T"], w: MLA, c: ModelConfig
) -> tuple[Float[Array, "B T Q"], Float[Array, "B T C"]]:
    """The narrow half of MLAProlog (section 4.2.2).

    Returns:
      The query latent (`x` itself in a model without one), and the rows `[normed key-value latent; rotated
      key]` to be cached.
    """
    a = _config(c)
    with jax.named_scope("MLAProlog"):
        q = x
        if w.q_a is not None:
            q = add_bias(einsum("btd,dq->btq", x, w.q_a), w.q_a_bias)
            q = rms_norm(q, w.q_norm, a.latent_norm_eps)
        kv = add_bias(einsum("btd,dc->btc", x, w.kv_a), w.kv_a_bias)
        latent, key = jnp.split(kv, [a.kv_lora_rank], axis=-1)
        latent = rms_norm(latent, w.kv_norm, a.latent_norm_eps)
        key = rotate(key[:, :, None], positions, c.rope)[:, :, 0]
        return q, jnp.concatenate([latent, key], axis=-1)


def up(q: Float[Array, "B T Q"], positions: Int[Array, "B T"], w: MLA, c: ModelConfig) -> Query:
    """The wide half of MLAProlog: the queries of the heads in `w`."""
    with jax.named_scope("MLAProlog"):
        heads = einsum("btq,qhn->bthn", q, w.q_b)
        nope, rope = jnp.split(heads, [_config(c).qk_nope_head_dim], axis=-1)
        return Query(nope, rotate(rope, positions, c.rope))


def prolog(
    x: Float[Array, "B T D"], positions: Int[Array, "B T"], kind: LayerKind, w: MLA, c: ModelConfig
) -> tuple[Query, Float[Array, "B T C"]]:
    """Returns the queries and the rows to be cached."""
    del kind  # all layers are alike
    q, rows = down(x, positions, w, c)
    return up(q, positions, w, c), rows


def _config(c: ModelConfig) -> MLAConfig:
    assert isinstance(c.attention, MLAConfig)
    return c.attention


def expanded(
    q: Query, latents: Float[Array, "B S C"], mask: Bool[Array, "B T S"], w: MLA, c: ModelConfig
) -> Float[Array, "B T H V"]:
    """Attention over keys and values rebuilt from the latents, for the heads in `w`. Rows that no query sees
    may hold anything, NaN included."""
    with jax.named_scope("FusedAttention"):
        latents = seen_rows(latents, mask).astype(q.nope.dtype)
        latent, key = jnp.split(latents, [_config(c).kv_lora_rank], axis=-1)
        k = jnp.einsum("bsa,hna->bhsn", latent, w.k_b)
        v = jnp.einsum("bsa,hva->bhsv", latent, w.v_b)
        # one rotated key for all heads
        shared = jnp.broadcast_to(key[:, None], (*k.shape[:3], key.shape[-1]))
        query, k = jnp.concatenate(q, axis=-1), jnp.concatenate([k, shared], axis=-1)
        p = probabilities(jnp.einsum("bthn,bhsn->bhts", query, k), mask, c.softmax_scale).astype(v.dtype)
        return jnp.einsum("bhts,bhsv->bthv", p, v)


def absorbed(
    q: Query, latents: Float[Array, "B S C"], mask: Bool[Array, "B T S"], w: MLA, c: ModelConfig
) -> Float[Array, "B T H V"]:
    """Attention in latent space. Rows that no query sees may hold anything, NaN included."""
    with jax.named_scope("FusedAttention"):
        latents = seen_rows(latents, mask).astype(q.nope.dtype)
        lifted = jnp.einsum("bthn,hna->btha", q.nope, w.k_b)
        query = jnp.concatenate([lifted, q.rope], axis=-1)
        scores = jnp.einsum("bthc,bsc->bhts", query, latents)
        p = probabilities(scores, mask, c.softmax_scale).astype(latents.dtype)
        # cut after the sum: before it, XLA would copy every cached latent
        out = jnp.einsum("bhts,bsc->bthc", p, latents)[..., : _config(c).kv_lora_rank]
        return jnp.einsum("btha,hva->bthv", out, w.v_b)
