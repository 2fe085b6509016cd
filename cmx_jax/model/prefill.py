"""The prefill program of one rank, and the program that scores whole sequences."""

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from cmx_jax.errors import CmxError
from cmx_jax.mesh.exchange import gather
from cmx_jax.mesh.layout import Layout
from cmx_jax.model import cache as paged
from cmx_jax.model.attention import (
    Attend,
    TokenPositions,
    data_parallel_attention,
    sequence_parallel_attention,
)
from cmx_jax.model.batch import PrefillBatch, StepOutput, concatenate, run_experts, split, sum_microbatches
from cmx_jax.model.cache import PagedCache, Rows
from cmx_jax.model.config import ModelConfig
from cmx_jax.model.decoder import Stream, decoder, logits, mtp_hidden, with_mtp
from cmx_jax.model.sampling import greedy, logprobs_of, next_tokens
from cmx_jax.model.sharding import head_axes
from cmx_jax.model.weights import Weights


def prefill_step(
    weights: Weights,
    cache: PagedCache,
    batch: PrefillBatch,
    *,
    c: ModelConfig,
    layout: Layout,
    sampled: bool,
    cached: bool,
    logprobs: bool = False,
) -> tuple[PagedCache, StepOutput]:
    """Runs prompts, fills their pages, samples their first tokens; with MTP layers drafts the next ones.

    Args:
      weights: The weights.
      cache: The cache.
      batch: The prompts, or chunks of them.
      c: The model.
      layout: Layout of the instance.
      sampled: True if any sequence is not greedy.
      cached: True if pages hold earlier chunks to attend to. If not, each token's address is its index.
      logprobs: True if logprobs of the first tokens are returned.
    """
    parts = split(batch, layout.microbatches)
    positions = [_of_all_ranks(TokenPositions(part.positions, part.begin), layout) for part in parts]
    attends = [
        _attend(part, tokens, cache, c, layout, cached) for part, tokens in zip(parts, positions, strict=True)
    ]
    run = run_experts(c, layout, parts[0].tokens.size)
    streams = [
        Stream(part.tokens, part.positions >= 0, attend) for part, attend in zip(parts, attends, strict=True)
    ]
    states, outputs = decoder(weights, c, streams, run, layout.tensor), []
    for i, (part, stream) in enumerate(zip(parts, streams, strict=True)):
        out = logits(_last_hidden(part, states[i].hidden, layout), weights, layout.tensor)
        tokens, drafts = next_tokens(out, part.sampling, part.lengths, sampled), None
        chosen = logprobs_of(out, tokens) if logprobs else None
        if weights.mtp is not None:
            following = Stream(_following(part, tokens, layout), stream.active, stream.attend)
            mtp = mtp_hidden(weights, c, states[i].hidden, following, run, layout.tensor)
            drafts = greedy(logits(_last_hidden(part, mtp.hidden, layout), weights, layout.tensor))
            states[i] = with_mtp(states[i], [mtp])
        outputs.append(StepOutput(tokens, None, drafts, None, chosen))
    rows, addresses = concatenate([state.rows for state in states], axis=1), concatenate(positions).addresses
    cache = paged.write(cache, batch.page_table, addresses, rows, layout.groups)
    output = concatenate(outputs)
    return cache, replace(output, stats=sum_microbatches([state.stats for state in states]))


def _attend(
    part: PrefillBatch,
    tokens: TokenPositions,
    cache: PagedCache,
    c: ModelConfig,
    layout: Layout,
    cached: bool,
) -> Attend:
    """Attention of a microbatch; `tokens` are those of all ranks that share its sequences."""

    def read(layer: Any) -> Rows:
        return paged.read(cache, layer, part.page_table, layout.groups)

    read_cache = read if cached else None
    span = part.page_table.shape[1] * cache.width if cached else tokens.positions.shape[1]
    if not layout.sequence:
        return data_parallel_attention(
            tokens, span, c, read_cache, kv_dtype=cache.dtype, tensor=layout.tensor
        )
    own = TokenPositions(part.positions, part.begin)
    return sequence_parallel_attention(
        own, tokens, span, c, layout.sequence, head_axes(c, layout), read_cache, cache.dtype
    )


def _of_all_ranks(tokens: TokenPositions, layout: Layout) -> TokenPositions:
    """Gathers the positions of all tokens of the rows where ranks share them."""
    return jax.tree.map(lambda a: gather(a, layout.sequence, 1), tokens) if layout.sequence else tokens


def _last_index(part: PrefillBatch, layout: Layout) -> tuple[Array, Array]:
    """Index `[B, J]` of each sequence's last token among this rank's tokens, and whether the rank has it."""
    first = 0
    if layout.sequence:
        first = jax.lax.axis_index(layout.sequence) * part.tokens.shape[1]
    index = part.last - first
    return index, (part.last >= 0) & (index >= 0) & (index < part.tokens.shape[1])


def _last_hidden(part: PrefillBatch, hidden: Float[Array, "B T D"], layout: Layout) -> Float[Array, "B J D"]:
    """The hidden state of each sequence's last token, on all ranks that share it."""
    index, present = _last_index(part, layout)
    last = jnp.take_along_axis(hidden, jnp.where(present, index, 0)[:, :, None], axis=1)
    last = jnp.where(present[:, :, None], last, jnp.zeros((), last.dtype))
    return jax.lax.psum(last, layout.sequence) if layout.sequence else last


def _following(part: PrefillBatch, tokens: Int[Array, "B J"], layout: Layout) -> Int[Array, "B T"]:
    """The token after each: the next one of the prompt, or the sampled one after the last of the prompt."""
    index, present = _last_index(part, layout)
    index = jnp.where(present, index, part.tokens.shape[1])
    sampled = jax.vmap(lambda row, i, new: row.at[i].set(new, mode="drop"))(part.following, index, tokens)
    return jnp.where(part.following < 0, sampled, part.following)  # a chunk may end before its prompt does


def score_step(
    weights: Weights,
    tokens: Int[Array, "B T"],
    lengths: Int[Array, " B"],
    *,
    c: ModelConfig,
    layout: Layout,
    kv_dtype: Any = None,
) -> Float[Array, "B T O"]:
    """Float32 logits of every position, without a cache.

    Args:
      weights: The weights.
      tokens: Sequences, one per row.
      lengths: Number of tokens of each sequence.
      c: The model.
      layout: Layout of the instance.
      kv_dtype: Type of a cache whose rounding the logits are to have; None: no rounding.
    """
    if layout.sequence:
        raise CmxError("a layout whose ranks share sequences can prefill only, expected sequence=()")
    index = jnp.arange(tokens.shape[1], dtype=jnp.int32)[None]
    positions = TokenPositions(jnp.where(index < lengths[:, None], index, -1))
    attend = data_parallel_attention(positions, tokens.shape[1], c, kv_dtype=kv_dtype, tensor=layout.tensor)
    stream, run = Stream(tokens, positions.positions >= 0, attend), run_experts(c, layout, tokens.size)
    [state] = decoder(weights, c, [stream], run, layout.tensor)
    return logits(state.hidden, weights, layout.tensor)
