"""The programs of an instance, as per-rank functions: `prefill_step`, `decode_step`, `score_step`.

Each takes what its rank holds and is run by any runner. `*_specs` says how the ranks' parts make up
whole arrays; `compile_steps` ties both together.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int

from cmx_jax.mesh.layout import Layout
from cmx_jax.mesh.runners import Runner
from cmx_jax.model import attention
from cmx_jax.model import cache as paged
from cmx_jax.model.cache import PagedCache
from cmx_jax.model.config import LayerKind, ModelConfig
from cmx_jax.model.decoder import decoder, logits
from cmx_jax.model.moe import MoEStats, RunExperts, exchanged
from cmx_jax.model.sampling import Sampling, greedy, sample
from cmx_jax.model.weights import Weights, weight_specs


@struct.dataclass
class PrefillBatch:
    """Whole prompts, padded. Rows of length 0 are empty."""

    tokens: Any  # [B, T] int32
    lengths: Any  # [B] int32
    page_table: Any  # [B, pages] int32
    sampling: Sampling


@struct.dataclass
class DecodeBatch:
    """The newest token of each running sequence. Rows of position -1 are empty."""

    tokens: Any  # [B] int32
    positions: Any  # [B] int32, where the token stands
    page_table: Any  # [B, pages] int32
    sampling: Sampling


@struct.dataclass
class StepOutput:
    """`tokens [B]`: the next token of each row. `stats`: of each MoE layer and rank (None without any)."""

    tokens: Any
    stats: Any  # MoEStats


def run_experts(c: ModelConfig, layout: Layout, tokens: int) -> RunExperts:
    """How `tokens` tokens a rank reach their experts under a layout."""
    return exchanged(
        layout.exchange,
        axis=layout.experts,
        slots_per_rank=layout.slots_per_rank,
        rows=layout.rows(tokens, c.num_experts_per_tok),
        wire=layout.wire,
    )


def _by_rank(stats: MoEStats | None) -> MoEStats | None:
    """Gives each rank's stats an axis of its own, behind the layer axis."""
    return jax.tree.map(lambda x: x[:, None], stats)


def _prompt(
    weights: Weights, c: ModelConfig, layout: Layout, tokens: Array, lengths: Array, cache: Any, write: Any
) -> tuple[Array, Any, MoEStats | None]:
    """Whole prompts; `write(cache, layer, positions, rows)` keeps what is to be kept."""
    batch, length = tokens.shape
    positions = jnp.broadcast_to(jnp.arange(length, dtype=jnp.int32), (batch, length))
    active = positions < lengths[:, None]
    masks = attention.masks(positions, length, c)

    def on_rows(cache: Any, index: Any, kind: LayerKind, q: Any, rows: Any, w: Any) -> Any:
        out = attention.prefill(q, rows, masks[kind.chunked], w, c)
        return out, write(cache, index, jnp.where(active, positions, -1), rows)

    return decoder(
        weights,
        c,
        tokens,
        positions,
        active,
        cache,
        on_rows,
        run_experts(c, layout, batch * length),
    )


def prefill_step(
    weights: Weights, cache: PagedCache, batch: PrefillBatch, *, c: ModelConfig, layout: Layout, sampled: bool
) -> tuple[PagedCache, StepOutput]:
    """Runs whole prompts, fills their pages, samples their first tokens."""

    def write(cache: PagedCache, index: Any, positions: Any, rows: Any) -> PagedCache:
        return paged.write(cache, index, batch.page_table, positions, rows)

    hidden, cache, stats = _prompt(weights, c, layout, batch.tokens, batch.lengths, cache, write)
    last = jnp.maximum(batch.lengths - 1, 0)[:, None, None]
    out = logits(jnp.take_along_axis(hidden, last, axis=1)[:, 0], weights)
    return cache, StepOutput(_choose(out, batch.sampling, batch.lengths, sampled), _by_rank(stats))


def decode_step(
    weights: Weights, cache: PagedCache, batch: DecodeBatch, *, c: ModelConfig, layout: Layout, sampled: bool
) -> tuple[PagedCache, StepOutput]:
    """One token of each sequence, attending over its pages."""
    positions = batch.positions[:, None]
    span = batch.page_table.shape[1] * cache.width
    masks = attention.masks(positions, span, c)

    def attend(cache: PagedCache, index: Any, kind: LayerKind, q: Any, rows: Any, w: Any) -> Any:
        cache = paged.write(cache, index, batch.page_table, positions, rows)
        held = paged.read(cache, index, batch.page_table)
        return attention.decode(q, held, masks[kind.chunked], w, c), cache

    hidden, cache, stats = decoder(
        weights,
        c,
        batch.tokens[:, None],
        jnp.maximum(positions, 0),
        positions >= 0,
        cache,
        attend,
        run_experts(c, layout, batch.tokens.shape[0]),
    )
    out = logits(hidden[:, 0], weights)
    return cache, StepOutput(_choose(out, batch.sampling, batch.positions + 1, sampled), _by_rank(stats))


def score_step(
    weights: Weights, tokens: Int[Array, "B T"], lengths: Int[Array, " B"], *, c: ModelConfig, layout: Layout
) -> Float[Array, "B T O"]:
    """Float32 logits of every position; no cache."""

    def forget(cache: Any, *_: Any) -> Any:
        return cache

    hidden, _, _ = _prompt(weights, c, layout, tokens, lengths, None, forget)
    return logits(hidden, weights)


def _choose(out: Array, s: Sampling, positions: Array, sampled: bool) -> Array:
    with jax.named_scope("Sampling"):
        return sample(out, s, positions) if sampled else greedy(out)


@dataclass(frozen=True)
class Steps:
    """The jitted whole-array programs of an instance.

    Attributes:
      prefill, decode: `(weights, cache, batch, sampled=...) -> (cache, StepOutput)`; the cache is donated.
        `sampled=False` is a cheaper program for batches in which every request is greedy.
      score: `(weights, tokens, lengths) -> logits`.
      take_pages: `(cache, ids [ranks * n]) -> pages`: each rank's `n` pages, copied out.
      put_pages: `(cache, ids, pages) -> cache`, donated.
    """

    prefill: Callable[..., Any]
    decode: Callable[..., Any]
    score: Callable[..., Any]
    take_pages: Callable[..., Any]
    put_pages: Callable[..., Any]


def step_specs(c: ModelConfig, layout: Layout, mtp: bool) -> tuple[Any, P, Any]:
    """Specs of the weights, of everything split like the sequences, and of a `StepOutput`."""
    axes = tuple(name for name, _ in layout.axes)
    # a prefix: one spec for all stats
    output = StepOutput(layout.data_spec, P(None, axes) if c.num_moe_layers else None)
    return weight_specs(c, layout.experts, mtp), layout.data_spec, output


def compile_steps(c: ModelConfig, layout: Layout, runner: Runner, mtp: bool) -> Steps:
    """The programs of an instance under a runner; each compiles at its first call with new shapes.

    Args:
      c: the model.
      layout: how it lies on the instance.
      runner: over the layout's axes.
      mtp: whether the weights carry MTP layers.
    """
    weights, data, output = step_specs(c, layout, mtp)

    def step(fn: Callable[..., Any]) -> Callable[..., Any]:
        variants = {
            sampled: runner.jit(
                partial(fn, c=c, layout=layout, sampled=sampled),
                (weights, data, data),
                (data, output),
                donate_argnums=(1,),
            )
            for sampled in (False, True)
        }
        return lambda weights, cache, batch, sampled: variants[sampled](weights, cache, batch)

    return Steps(
        prefill=step(prefill_step),
        decode=step(decode_step),
        score=runner.jit(partial(score_step, c=c, layout=layout), (weights, data, data), data),
        take_pages=runner.jit(paged.take_pages, (data, data), data),
        put_pages=runner.jit(paged.put_pages, (data, data, data), data, donate_argnums=(0,)),
    )
