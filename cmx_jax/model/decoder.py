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

from cmx_jax.model.attention import project_out, prolog
from cmx_jax.model.config import LayerKind, ModelConfig, segments
from cmx_jax.model.layers import layer_norm, rms_norm, swiglu
from cmx_jax.model.moe import MoEStats, RunExperts, moe
from cmx_jax.model.weights import FFN, GQA, MLA, MTP, Experts, Layer, Weights, split_experts

Attend = Callable[[Any, Array, LayerKind, Any, Array, MLA | GQA], tuple[Array, Any]]
"""(cache, layer index, kind, queries, new rows, weights) -> (attention output [B, T, H, V], cache)."""

MTP_KIND = LayerKind(moe=True)


def norm(x: Float[Array, "*B D"], weight: Float[Array, " D"] | None, c: ModelConfig) -> Float[Array, "*B D"]:
    """The model's norm; `x` itself where a block has none."""
    if weight is None:
        return x
    return (rms_norm if c.norm == "rms" else layer_norm)(x, weight, c.rms_norm_eps)


def layer(
    x: Float[Array, "B T D"],
    positions: Int[Array, "B T"],
    active: Bool[Array, "B T"],
    w: Layer,
    kind: LayerKind,
    experts: Experts,
    index: Int[Array, ""],
    c: ModelConfig,
    attend: Callable[[Any, Array, MLA | GQA], tuple[Array, Any]],
    run: RunExperts,
) -> tuple[Float[Array, "B T D"], Any, MoEStats | None]:
    """Attention and FFN with residuals, one behind the other or side by side; stats are None of a dense
    layer.

    `w` is of one layer, `experts` of the stack, in which it is number `index`.
    """
    h = norm(x, w.attn_norm, c)
    query, rows = prolog(h, positions, kind, w.attn, c)
    out, cache = attend(query, rows, w.attn)
    attended = x + norm(project_out(out, w.attn), w.attn_out_norm, c)
    h = h if c.block == "parallel" else norm(attended, w.ffn_norm, c)
    if isinstance(w.ffn, FFN):
        with jax.named_scope("DenseFFN"):
            return attended + norm(swiglu(h, w.ffn), w.ffn_out_norm, c), cache, None
    y, stats = moe(h.reshape(-1, h.shape[-1]), active.reshape(-1), w.ffn, experts, index, c, run)
    return attended + norm(y.reshape(x.shape), w.ffn_out_norm, c), cache, stats


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
    carry, stats = (weights.embed[tokens], cache), []
    first, done = 0, {"dense": 0, "moe": 0}  # layers behind us, in all and of each stack

    def one(carry: Any, w: Layer, kind: LayerKind, experts: Experts, number: Array, index: Array) -> Any:
        x, cache = carry
        x, cache, stats = layer(
            x,
            positions,
            active,
            w,
            kind,
            experts,
            index,
            c,
            lambda q, rows, a: attend(cache, number, kind, q, rows, a),
            run,
        )
        return (x, cache), stats

    for times, pattern in segments(c.layers):
        carry, ys = _scan(weights, times, pattern, first, done, carry, one)
        stats += [] if ys is None else [ys]
        first += times * len(pattern)
        for kind in pattern:
            done[_stack(kind)] += times
    x, _ = carry
    merged = jax.tree.map(lambda *parts: jnp.concatenate(parts), *stats) if stats else None
    return norm(x, weights.norm, c), carry[1], merged


def _stack(kind: LayerKind) -> str:
    return "moe" if kind.moe else "dense"


def _scan(
    weights: Weights,
    times: int,
    pattern: tuple[LayerKind, ...],
    first: int,
    done: dict[str, int],
    carry: Any,
    one: Callable[..., Any],
) -> tuple[Any, MoEStats | None]:
    """Runs a pattern of layers several times, as one loop.

    Args:
      weights: of the model.
      times: how often.
      pattern: kinds of the layers of one round.
      first: number of the first layer.
      done: layers of each stack that lie before it.
      carry: hidden states and cache.
      one: runs one layer.
    """
    counts = {name: sum(_stack(kind) == name for kind in pattern) for name in map(_stack, pattern)}
    split = {name: split_experts(getattr(weights, name)) for name in counts}
    scanned = {name: layers for name, (layers, _) in split.items() if layers.attn_norm.shape[0] == times}

    def body(carry: Any, xs: tuple[dict[str, Layer], Array]) -> tuple[Any, MoEStats | None]:
        (here, i), used, stats = xs, dict.fromkeys(counts, 0), []
        for j, kind in enumerate(pattern):
            name = _stack(kind)
            layers, experts = split[name]
            index = done[name] + i * counts[name] + used[name]
            w = here[name] if name in here else _layer(layers, index)
            carry, s = one(carry, w, kind, experts, first + i * len(pattern) + j, index)
            stats += [] if s is None else [s]
            used[name] += 1
        return carry, jax.tree.map(lambda *parts: jnp.stack(parts), *stats) if stats else None

    carry, stats = jax.lax.scan(body, carry, (scanned, jnp.arange(times, dtype=jnp.int32)))
    return carry, jax.tree.map(lambda s: s.reshape(-1, *s.shape[2:]), stats)


def _layer(stack: Layer, index: Array) -> Layer:
    """One layer of a stack that the loop does not run over as it is.

    Reshaping a stack to the loop's rounds would be simpler, but XLA then copies all of it in every step.
    """
    return jax.tree.map(lambda a: jax.lax.dynamic_index_in_dim(a, index, keepdims=False), stack)


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
    attend: Callable[[Any, Array, MLA | GQA], tuple[Array, Any]],
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
        embedding = norm(weights.embed[next_tokens], w.enorm, c)
        joined = jnp.concatenate([embedding, norm(hidden, w.hnorm, c)], axis=-1)
        x = jnp.einsum("bte,ed->btd", joined, w.eh_proj)
        index = jnp.asarray(module, jnp.int32)
        x, cache, stats = layer(x, positions, active, w.layer, MTP_KIND, experts, index, c, attend, run)
        return norm(x, w.norm, c), cache, stats
