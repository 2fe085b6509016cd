"""The decoder: one body for every layer, scanned over the stacks of equal layers.

Prefill, decode and training differ only in two functions that they pass in: how new tokens attend
(`Attend`) and how experts are run (`RunExperts`).

Tokens go through the layers in one stream, or in several (microbatches, sections 4.2.3 and 4.3.2). No value
of one stream depends on another, so a backend may run the attention of one while the experts of another are
under way.
"""

import functools
import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
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
    """Tokens that go through the layers together: ids `[B, T]`, whether each is one, how they attend."""

    tokens: Any
    active: Any
    attend: Attend


class Decoded(NamedTuple):
    """What became of a stream: hidden states `[B, T, D]`, the rows of its tokens in all layers
    `[L, B, T, C]` as the cache keeps them, and stats of the MoE layers, which come first in their arrays
    (None without any)."""

    hidden: Any
    rows: Any
    stats: Any


MTP_KIND = LayerKind(moe=True)


def norm(x: Float[Array, "*B D"], weight: Float[Array, " D"] | None, c: ModelConfig) -> Float[Array, "*B D"]:
    """The model's norm; `x` itself where a block has none."""
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
    """Attention and FFN with residuals, one behind the other or side by side, of each stream.

    Args:
      xs: hidden states of each stream.
      streams: the rest of them.
      w: weights of this layer.
      kind: its kind.
      experts: of the stack that it lies in.
      number: of the layer among all.
      index: of the layer in its stack.
      c: the model.
      run: how experts are run.
      tensor: axes over which FFNs are split.
    """
    between = []
    for i, (x, stream) in enumerate(zip(xs, streams, strict=True)):
        with _named(i, streams):
            h = norm(x, w.attn_norm, c)
            out, rows = stream.attend(number, kind, h, w.attn)
            attended = x + norm(out, w.attn_out_norm, c)
            between.append((h if c.block == "parallel" else norm(attended, w.ffn_norm, c), attended, rows))
    done = []
    for i, ((h, attended, rows), stream) in enumerate(zip(between, streams, strict=True)):
        with _named(i, streams):
            y, stats = _ffn(h, stream.active, w, experts, index, c, run, tensor)
            done.append(Decoded(attended + norm(y, w.ffn_out_norm, c), rows, stats))
    return done


def _named(i: int, streams: Sequence[Stream]) -> AbstractContextManager[Any]:
    """Where there are several streams, what is done for each says so in profiles and compiled programs."""
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
    """Embedding, all layers, final norm, of each stream; `tensor`: axes over which FFNs are split."""
    xs: Any = [weights.embed[stream.tokens] for stream in streams]
    first, done = 0, {"dense": 0, "moe": 0}  # layers behind us, in all and of each stack
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
    rows, stats = (_concatenated([part[i] for part in parts]) for i in (0, 1))
    found = [None] * len(xs) if stats is None else stats
    return [Decoded(norm(x, weights.norm, c), *of) for x, *of in zip(xs, rows, found, strict=True)]


def _concatenated(parts: list[Any]) -> Any:
    """Along the first axis, without those that are None."""
    there = [part for part in parts if part is not None]
    return jax.tree.map(lambda *a: jnp.concatenate(a), *there) if there else None


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
    """Runs a pattern of layers several times, as one loop; returns hidden states, and rows and stats of each
    layer (None of dense layers).

    Args:
      weights: of the model.
      times: how often.
      pattern: kinds of the layers of one round.
      first: number of the first layer.
      done: layers of each stack that lie before it.
      xs: hidden states of each stream.
      one: runs one layer.
    """
    counts = {name: sum(_stack(kind) == name for kind in pattern) for name in map(_stack, pattern)}
    split = {name: split_experts(getattr(weights, name)) for name in counts}
    scanned = {name: layers for name, (layers, _) in split.items() if layers.attn_norm.shape[0] == times}

    def body(xs: Any, at: tuple[dict[str, Layer], Array]) -> tuple[Any, tuple[Any, Any]]:
        (here, i), used, rows, stats = at, dict.fromkeys(counts, 0), [], []
        for j, kind in enumerate(pattern):
            name = _stack(kind)
            layers, experts = split[name]
            index = done[name] + i * counts[name] + used[name]
            w = here[name] if name in here else _layer(layers, index)
            xs, r, s = one(xs, w, kind, experts, first + i * len(pattern) + j, index)
            rows.append(r)
            stats += [s] if kind.moe else []
            used[name] += 1
        return xs, (_stacked(rows), _stacked(stats))

    xs, ys = jax.lax.scan(body, xs, (scanned, jnp.arange(times, dtype=jnp.int32)))
    return xs, jax.tree.map(lambda y: y.reshape(-1, *y.shape[2:]), ys)


def _stacked(parts: list[Any]) -> Any:
    return jax.tree.map(lambda *a: jnp.stack(a), *parts) if parts else None


def _layer(stack: Layer, index: Array) -> Layer:
    """One layer of a stack that the loop does not run over as it is.

    Reshaping a stack to the loop's rounds would be simpler, but XLA then copies all of it in every step.
    """
    return jax.tree.map(lambda a: jax.lax.dynamic_index_in_dim(a, index, keepdims=False), stack)


HEAD_BLOCKS = 4


def logits(hidden: Float[Array, "*B D"], weights: Weights, tensor: Axis = ()) -> Float[Array, "*B O"]:
    """Hidden states to float32 logits; `tensor`: axes over which the head is split by the vocabulary (never
    where it is the embedding), and logits are gathered.

    Summed in blocks of the width: one running float32 sum of large terms that cancel would cost more digits
    than all layers before it.
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
        found = functools.reduce(jnp.add, parts)
        return found if weights.head is None else gather(found, tensor, found.ndim - 1)


def with_mtp(main: Decoded, modules: Sequence[Decoded]) -> Decoded:
    """Rows of the first MTP run behind those of the model, the stats of all behind its stats."""
    stats = _concatenated([main.stats, *(module.stats for module in modules)])
    return Decoded(main.hidden, _concatenated([main.rows, modules[0].rows]), stats)


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
      weights: with MTP layers.
      hidden: after the final norm, or the result of the module for the position before.
      stream: the token *behind* each position, and how the module attends.
      run, tensor: as of `layer`.
    """
    with jax.named_scope("MTP"):
        mtp = weights.mtp
        assert mtp is not None
        stack, experts = split_experts(mtp.layer)
        w = jax.tree.map(lambda a: a[0], mtp.replace(layer=stack))
        embedding = norm(weights.embed[stream.tokens], w.enorm, c)
        joined = jnp.concatenate([embedding, norm(hidden, w.hnorm, c)], axis=-1)
        x = einsum("bte,ed->btd", joined, w.eh_proj)
        number, index = jnp.asarray(c.num_hidden_layers, jnp.int32), jnp.zeros((), jnp.int32)
        [done] = layer([x], [stream], w.layer, MTP_KIND, experts, number, index, c, run, tensor)
        one_layer = jax.tree.map(lambda a: a[None], done._replace(hidden=None))
        return one_layer._replace(hidden=norm(done.hidden, w.norm, c))
