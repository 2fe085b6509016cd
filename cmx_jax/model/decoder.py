"""The decoder: one body for every layer, scanned over the stacks of equal layers.

Prefill, decode and training differ only in two functions that they pass in: `Attend` (attention of the new
tokens) and `RunExperts` (dispatch, experts, combine).

Tokens go through the layers in one stream, or in several (microbatches, sections 4.2.3 and 4.3.2). No value
of one stream depends on another, so a backend may run the attention of one while the experts of another are
under way.
"""

import functools
import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from cmx_jax.mesh.exchange import Axis, gather, psum_if
from cmx_jax.model.attention import Attend
from cmx_jax.model.config import LayerKind, ModelConfig, segments
from cmx_jax.model.layers import layer_norm, rms_norm, swiglu
from cmx_jax.model.moe import MoEStats, RunExperts, moe
from cmx_jax.model.weights import FFN, Experts, Layer, Weights, split_experts
from cmx_jax.quant import einsum


@dataclass(frozen=True)
class Stream:
    """Tokens that go through the layers together.

    Attributes:
      tokens: Token ids, int32 `[B, T]`.
      active: True if each is a token rather than padding, bool `[B, T]`.
      attend: Attention of these tokens.
    """

    tokens: Any
    active: Any
    attend: Attend


class Decoded(NamedTuple):
    """Results of a stream, of one layer or of several.

    Attributes:
      hidden: Hidden states `[B, T, D]`.
      rows: New rows of the cache, `[L, B, T, C]`, in the cache's format (one layer: without `L`).
      stats: `MoEStats` with a leading axis for the MoE layers (one layer: without it); None without any.
    """

    hidden: Any
    rows: Any
    stats: Any


MTP_KIND = LayerKind(moe=True)


def norm(x: Float[Array, "*B D"], weight: Float[Array, " D"] | None, c: ModelConfig) -> Float[Array, "*B D"]:
    """The model's norm; returns `x` itself where a block has no norm."""
    if weight is None:
        return x
    return (rms_norm if c.norm == "rms" else layer_norm)(x, weight, c.rms_norm_eps)


def layer(
    xs: Sequence[Float[Array, "B T D"]],
    streams: Sequence[Stream],
    w: Layer,
    kind: LayerKind,
    experts: Experts,
    number: Int[Array, ""],
    index: Int[Array, ""],
    c: ModelConfig,
    run: RunExperts,
    tensor: Axis = (),
) -> list[Decoded]:
    """Attention and FFN with residuals, one after the other or side by side, for each stream.

    Args:
      xs: Hidden states of each stream.
      streams: The streams.
      w: Weights of this layer, without experts.
      kind: Kind of this layer.
      experts: Experts of the whole stack of layers.
      number: Number of the layer among all layers.
      index: Index of the layer in its stack.
      c: The model.
      run: Runner of the experts.
      tensor: Mesh axes over which FFNs are split.
    """
    between = []
    for i, (x, stream) in enumerate(zip(xs, streams, strict=True)):
        with _named(i, streams):
            h = norm(x, w.attn_norm, c)
            out, rows = stream.attend(number, kind, h, w.attn)
            attended = x + norm(out, w.attn_out_norm, c)
            between.append((h if c.block == "parallel" else norm(attended, w.ffn_norm, c), attended, rows))
    results = []
    for i, ((h, attended, rows), stream) in enumerate(zip(between, streams, strict=True)):
        with _named(i, streams):
            y, stats = _ffn(h, stream.active, w, experts, index, c, run, tensor)
            results.append(Decoded(attended + norm(y, w.ffn_out_norm, c), rows, stats))
    return results


def _named(i: int, streams: Sequence[Stream]) -> AbstractContextManager[Any]:
    """Names the stream in profiles and compiled programs, if there are several."""
    return jax.named_scope(f"Stream{i}") if len(streams) > 1 else nullcontext()


def _ffn(
    h: Array,
    active: Array,
    w: Layer,
    experts: Experts,
    index: Array,
    c: ModelConfig,
    run: RunExperts,
    tensor: Axis,
) -> tuple[Array, MoEStats | None]:
    if isinstance(w.ffn, FFN):
        with jax.named_scope("DenseFFN"):
            return psum_if(swiglu(h, w.ffn), tensor), None
    y, stats = moe(h.reshape(-1, h.shape[-1]), active.reshape(-1), w.ffn, experts, index, c, run)
    with jax.named_scope("Combine"):
        return psum_if(y, tensor).reshape(h.shape), stats


def decoder(
    weights: Weights, c: ModelConfig, streams: Sequence[Stream], run: RunExperts, tensor: Axis = ()
) -> list[Decoded]:
    """Runs embedding, all layers and the final norm for each stream.

    Args:
      weights: The weights.
      c: The model.
      streams: The streams.
      run: Runner of the experts.
      tensor: Mesh axes over which FFNs are split.
    """
    xs: Any = [weights.embed[stream.tokens] for stream in streams]
    first, done = 0, {"dense": 0, "moe": 0}  # layers already run, in total and by stack
    parts: list[Any] = []

    def one(xs: Any, w: Layer, kind: LayerKind, experts: Experts, number: Array, index: Array) -> Any:
        results = layer(xs, streams, w, kind, experts, number, index, c, run, tensor)
        return [r.hidden for r in results], [r.rows for r in results], [r.stats for r in results]

    for times, pattern in segments(c.layers):
        xs, ys = _scan(weights, times, pattern, first, done, xs, one)
        parts.append(ys)
        first += times * len(pattern)
        for kind in pattern:
            done[_stack(kind)] += times
    rows, stats = (_concatenate([part[i] for part in parts]) for i in (0, 1))
    stats = [None] * len(xs) if stats is None else stats
    return [Decoded(norm(x, weights.norm, c), r, s) for x, r, s in zip(xs, rows, stats, strict=True)]


def _concatenate(parts: list[Any]) -> Any:
    """Concatenates trees along the first axis, leaving out those that are None."""
    present = [part for part in parts if part is not None]
    return jax.tree.map(lambda *a: jnp.concatenate(a), *present) if present else None


def _stack(kind: LayerKind) -> str:
    return "moe" if kind.moe else "dense"


def _scan(
    weights: Weights,
    times: int,
    pattern: tuple[LayerKind, ...],
    first: int,
    done: dict[str, int],
    xs: Any,
    one: Callable[..., Any],
) -> tuple[Any, tuple[Any, Any]]:
    """Runs a pattern of layers several times, as one loop.

    Args:
      weights: Weights of the model.
      times: Number of rounds of the loop.
      pattern: Kinds of the layers of one round.
      first: Number of the first layer.
      done: Number of layers of each stack before the first layer.
      xs: Hidden states of each stream.
      one: Runs one layer.

    Returns:
      Hidden states, and rows and stats of each layer (no stats for dense layers).
    """
    counts = {name: sum(_stack(kind) == name for kind in pattern) for name in map(_stack, pattern)}
    split = {name: split_experts(getattr(weights, name)) for name in counts}
    scanned = {name: layers for name, (layers, _) in split.items() if layers.attn_norm.shape[0] == times}

    def body(xs: Any, turn: tuple[dict[str, Layer], Array]) -> tuple[Any, tuple[Any, Any]]:
        (current, i), used, rows, stats = turn, dict.fromkeys(counts, 0), [], []
        for j, kind in enumerate(pattern):
            name = _stack(kind)
            layers, experts = split[name]
            index = done[name] + i * counts[name] + used[name]
            w = current[name] if name in current else _layer(layers, index)
            xs, r, s = one(xs, w, kind, experts, first + i * len(pattern) + j, index)
            rows.append(r)
            stats += [s] if kind.moe else []
            used[name] += 1
        return xs, (_stack_trees(rows), _stack_trees(stats))

    xs, ys = jax.lax.scan(body, xs, (scanned, jnp.arange(times, dtype=jnp.int32)))
    return xs, jax.tree.map(lambda y: y.reshape(-1, *y.shape[2:]), ys)


def _stack_trees(parts: list[Any]) -> Any:
    return jax.tree.map(lambda *a: jnp.stack(a), *parts) if parts else None


def _layer(stack: Layer, index: Array) -> Layer:
    """Cuts one layer out of a stack that the loop does not scan over.

    Reshaping the stack to the rounds of the loop would be simpler, but XLA then copies all of it in every
    step.
    """
    return jax.tree.map(lambda a: jax.lax.dynamic_index_in_dim(a, index, keepdims=False), stack)


HEAD_BLOCKS = 4


def logits(hidden: Float[Array, "*B D"], weights: Weights, tensor: Axis = ()) -> Float[Array, "*B O"]:
    """Float32 logits of hidden states.

    Sums are taken in blocks of the width: one running float32 sum of large terms that cancel would cost more
    digits than all layers before it.

    Args:
      hidden: Hidden states after the final norm.
      weights: The weights.
      tensor: Mesh axes over which the head is split by the vocabulary, and logits are gathered; a head that
        is the embedding is never split.
    """
    head = weights.embed.T if weights.head is None else weights.head
    width = head.shape[0]
    blocks = math.gcd(width, HEAD_BLOCKS)
    with jax.named_scope("LMHead"):  # reshaped, not cut: XLA would copy each part of the head first
        parts = jnp.einsum(
            "...kd,kdo->k...o",
            hidden.reshape(*hidden.shape[:-1], blocks, width // blocks),
            head.reshape(blocks, width // blocks, -1),
            preferred_element_type=jnp.dtype(jnp.float32),
        )
        result = functools.reduce(jnp.add, parts)
        return result if weights.head is None else gather(result, tensor, result.ndim - 1)


def with_mtp(main: Decoded, modules: Sequence[Decoded]) -> Decoded:
    """Appends the rows of the first MTP run, and the stats of all MTP runs, to those of the model."""
    stats = _concatenate([main.stats, *(module.stats for module in modules)])
    return Decoded(main.hidden, _concatenate([main.rows, modules[0].rows]), stats)


def mtp_hidden(
    weights: Weights,
    c: ModelConfig,
    hidden: Float[Array, "B T D"],
    stream: Stream,
    run: RunExperts,
    tensor: Axis = (),
) -> Decoded:
    """The first MTP module: from the hidden state at `i` and token `i + 1` to the state that predicts `i + 2`
    (DeepSeek-V3 report, formulas 21 to 23).

    Args:
      weights: Weights with MTP layers.
      c: The model.
      hidden: Hidden states after the final norm, or the result of this module for the position before.
      stream: The token that *follows* each position, and the attention of the module.
      run: Runner of the experts.
      tensor: Mesh axes over which FFNs are split.
    """
    with jax.named_scope("MTP"):
        mtp = weights.mtp
        assert mtp is not None
        stack, experts = split_experts(mtp.layer)
        w = jax.tree.map(lambda a: a[0], replace(mtp, layer=stack))
        embedding = norm(weights.embed[stream.tokens], w.enorm, c)
        pair = jnp.concatenate([embedding, norm(hidden, w.hnorm, c)], axis=-1)
        x = einsum("bte,ed->btd", pair, w.eh_proj)
        number, index = jnp.asarray(c.num_hidden_layers, jnp.int32), jnp.zeros((), jnp.int32)
        [state] = layer([x], [stream], w.layer, MTP_KIND, experts, number, index, c, run, tensor)
        one_layer = jax.tree.map(lambda a: a[None], state._replace(hidden=None))
        return one_layer._replace(hidden=norm(state.hidden, w.norm, c))
