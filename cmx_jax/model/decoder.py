"""The decoder: one body for every layer, scanned over the stacks of equal layers.

Prefill, decode and training differ only in two functions that they pass in: how new tokens attend
(`Attend`) and how experts are run (`RunExperts`).
"""

import functools
import itertools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from cmx_jax.model.attention import Query, project_out, prolog
from cmx_jax.model.config import ModelConfig
from cmx_jax.model.layers import rms_norm, swiglu
from cmx_jax.model.moe import MoEStats, RunExperts, moe
from cmx_jax.model.weights import FFN, MTP, Attention, Experts, Layer, Weights, split_experts

Attend = Callable[[Any, Array, Query, Array, Attention], tuple[Array, Any]]
"""(cache, layer index, queries, new latents, weights) -> (attention output [B, T, H, V], cache)."""


def layer(
    x: Float[Array, "B T D"],
    positions: Int[Array, "B T"],
    active: Bool[Array, "B T"],
    w: Layer,
    experts: Experts,
    index: Int[Array, ""],
    c: ModelConfig,
    attend: Callable[[Query, Array, Attention], tuple[Array, Any]],
    run: RunExperts,
) -> tuple[Float[Array, "B T D"], Any, MoEStats | None]:
    """Pre-norm attention and FFN with residuals; the stats are None for a dense layer.

    `w` is of one layer, `experts` of the stack, in which it is number `index`.
    """
    query, latents = prolog(rms_norm(x, w.attn_norm, c.rms_norm_eps), positions, w.attn, c)
    out, cache = attend(query, latents, w.attn)
    x = x + project_out(out, w.attn)
    h = rms_norm(x, w.ffn_norm, c.rms_norm_eps)
    if isinstance(w.ffn, FFN):
        with jax.named_scope("DenseFFN"):
            return x + swiglu(h, w.ffn), cache, None
    y, stats = moe(h.reshape(-1, h.shape[-1]), active.reshape(-1), w.ffn, experts, index, c, run)
    return x + y.reshape(x.shape), cache, stats


def decoder(
    weights: Weights,
    c: ModelConfig,
    tokens: Int[Array, "B T"],
    positions: Int[Array, "B T"],
    active: Bool[Array, "B T"],
    cache: Any,
    attend: Attend,
    run: RunExperts,
) -> tuple[Float[Array, "B T D"], Any, MoEStats | None]:
    """Embedding, all layers, final norm.

    Returns:
      Hidden states after the final norm, the cache, and the MoE layers' stats with a leading axis of
      MoE layers (None without any).
    """
    carry, stats, first = (weights.embed[tokens], cache), None, 0
    for stack in (weights.dense, weights.moe):
        if stack is not None:
            carry, stats = _scan(stack, first, carry, positions, active, c, attend, run)
            first += stack.attn_norm.shape[0]
    x, cache = carry
    return rms_norm(x, weights.norm, c.rms_norm_eps), cache, stats


def _scan(
    stack: Layer,
    first: int,
    carry: tuple[Array, Any],
    positions: Array,
    active: Array,
    c: ModelConfig,
    attend: Attend,
    run: RunExperts,
) -> tuple[tuple[Array, Any], MoEStats | None]:
    """All layers of a stack, which begins at the model's layer `first`; carries hidden states and cache."""
    layers, experts = split_experts(stack)

    def body(carry: tuple[Array, Any], scanned: tuple[Layer, Array]) -> tuple[Any, MoEStats | None]:
        (x, cache), (w, i) = carry, scanned
        x, cache, stats = layer(
            x, positions, active, w, experts, i, c, lambda q, kv, a: attend(cache, first + i, q, kv, a), run
        )
        return (x, cache), stats

    return jax.lax.scan(body, carry, (layers, jnp.arange(stack.attn_norm.shape[0], dtype=jnp.int32)))


HEAD_BLOCKS = 4


def logits(hidden: Float[Array, "*B D"], weights: Weights) -> Float[Array, "*B O"]:
    """Hidden states to float32 logits.

    Summed in blocks of the width: one running float32 sum of large terms that cancel would cost more digits
    than all layers before it.
    """
    head = weights.embed.T if weights.head is None else weights.head
    ends = [i * head.shape[0] // HEAD_BLOCKS for i in range(HEAD_BLOCKS + 1)]
    with jax.named_scope("LMHead"):
        parts = (
            jnp.einsum(
                "...d,do->...o", hidden[..., i:j], head[i:j], preferred_element_type=jnp.dtype(jnp.float32)
            )
            for i, j in itertools.pairwise(ends)
        )
        return functools.reduce(jnp.add, parts)


def mtp_hidden(
    weights: Weights,
    mtp: MTP,
    c: ModelConfig,
    module: int,
    hidden: Float[Array, "B T D"],
    next_tokens: Int[Array, "B T"],
    positions: Int[Array, "B T"],
    active: Bool[Array, "B T"],
    attend: Callable[[Query, Array, Attention], tuple[Array, Any]],
    run: RunExperts,
) -> tuple[Float[Array, "B T D"], Any, MoEStats | None]:
    """One MTP module: from the hidden state at `i` and token `i + 1` to the state that predicts `i + 2`.

    Args:
      mtp: the MTP modules of `weights`.
      module: which of them.
      hidden: after the final norm (or the previous module's result).
      next_tokens: the token behind each position.
    """
    with jax.named_scope("MTP"):
        stack, experts = split_experts(mtp.layer)
        w = jax.tree.map(lambda a: a[module], mtp.replace(layer=stack))
        embedding = rms_norm(weights.embed[next_tokens], w.enorm, c.rms_norm_eps)
        joined = jnp.concatenate([embedding, rms_norm(hidden, w.hnorm, c.rms_norm_eps)], axis=-1)
        x = jnp.einsum("bte,ed->btd", joined, w.eh_proj)
        index = jnp.asarray(module, jnp.int32)
        x, cache, stats = layer(x, positions, active, w.layer, experts, index, c, attend, run)
        return rms_norm(x, w.norm, c.rms_norm_eps), cache, stats
