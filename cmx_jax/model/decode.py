"""The decode program of one rank: verify drafts, sample, draft again (section 4.2.4).

A step runs the newest token of each sequence and `k` drafts after it through the model at once. At each of
the `1 + k` positions a token is sampled as if there were no drafts. Tokens after the first one that its draft
did not match are void. A draft is a single token, not a distribution, so this *is* rejection sampling: a
draft is kept with the probability that the model gives it, and the token that replaces it has the model's
distribution without it. A seed gives the same text with drafts and without. Then the MTP layer runs over the
kept positions and drafts the next tokens. All of this is one program: no host waits between the parts.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from cmx_jax.errors import CmxError
from cmx_jax.mesh.exchange import Axis
from cmx_jax.mesh.layout import Layout
from cmx_jax.model import cache as paged
from cmx_jax.model.attention import Attend, TokenPositions, data_parallel_attention
from cmx_jax.model.batch import DecodeBatch, StepOutput, concatenate, run_experts, split, sum_microbatches
from cmx_jax.model.cache import PagedCache, Rows
from cmx_jax.model.config import ModelConfig
from cmx_jax.model.decoder import Decoded, Stream, decoder, logits, mtp_hidden, with_mtp
from cmx_jax.model.moe import RunExperts
from cmx_jax.model.sampling import greedy, logprobs_of, next_tokens
from cmx_jax.model.weights import Weights

MAX_DRAFTS = 16  # the MTP layer is compiled once for each


@dataclass(frozen=True)
class _Step:
    """Arguments that all microbatches of a step have in common.

    Attributes:
      weights: The weights.
      c: The model.
      attention: `data_parallel_attention`, partially applied: it still needs positions and cached rows.
      run: Runner of the experts.
      tensor: Mesh axes of tensor parallelism.
      sampled: True if any sequence is not greedy.
      logprobs: True if logprobs are returned.
    """

    weights: Weights
    c: ModelConfig
    attention: Callable[..., Attend]
    run: RunExperts
    tensor: Axis
    sampled: bool
    logprobs: bool


def decode_step(
    weights: Weights,
    cache: PagedCache,
    batch: DecodeBatch,
    *,
    c: ModelConfig,
    layout: Layout,
    sampled: bool,
    logprobs: bool = False,
) -> tuple[PagedCache, StepOutput]:
    """One to `1 + k` tokens of each sequence, attending over its pages.

    Args:
      weights: The weights.
      cache: The cache.
      batch: The newest tokens and their drafts.
      c: The model.
      layout: Layout of the instance.
      sampled: True if any sequence is not greedy.
      logprobs: True if logprobs of the tokens are returned.
    """
    if layout.sequence:
        raise CmxError("a layout whose ranks share sequences can prefill only, expected sequence=()")
    parts = split(batch, layout.microbatches)
    positions = [_positions(part) for part in parts]
    attention = partial(
        data_parallel_attention,
        span=batch.page_table.shape[1] * cache.width,
        c=c,
        absorbed=True,
        kv_dtype=cache.dtype,
        tensor=layout.tensor,
    )
    streams = []
    for part, tokens in zip(parts, positions, strict=True):

        def read_cache(layer: Array, part: DecodeBatch = part) -> Rows:
            return paged.read(cache, layer, part.page_table, layout.groups)

        attend = attention(tokens, read_cache=read_cache)
        streams.append(Stream(jnp.maximum(part.tokens, 0), tokens.positions >= 0, attend))
    run = run_experts(c, layout, parts[0].tokens.size)
    step = _Step(weights, c, attention, run, layout.tensor, sampled, logprobs)
    states = decoder(weights, c, streams, run, layout.tensor)
    outputs = []
    for i, part in enumerate(parts):
        states[i], output = _verify(step, part, positions[i], states[i], cache, layout.groups)
        outputs.append(output)
    rows, addresses = concatenate([state.rows for state in states], axis=1), concatenate(positions).addresses
    cache = paged.write(cache, batch.page_table, addresses, rows, layout.groups)
    output = concatenate(outputs)
    return cache, replace(output, stats=sum_microbatches([state.stats for state in states]))


def _verify(
    step: _Step,
    part: DecodeBatch,
    positions: TokenPositions,
    state: Decoded,
    cache: PagedCache,
    groups: int,
) -> tuple[Decoded, StepOutput]:
    """Samples the tokens of a microbatch, counts its correct drafts and drafts the next tokens.

    Returns:
      The decoder's results, with those of the MTP layer if there is one, and the output without stats.
    """
    out = logits(state.hidden, step.weights, step.tensor)
    tokens = next_tokens(out, part.sampling, positions.positions + 1, step.sampled)
    accepted, drafts = _accepted(part, tokens), None
    if step.weights.mtp is not None:
        cached = paged.read(cache, step.c.num_hidden_layers, part.page_table, groups)
        drafts, modules = _draft(step, state, tokens, accepted, positions, cached)
        state = with_mtp(state, modules)
    chosen = logprobs_of(out, tokens) if step.logprobs else None
    return state, StepOutput(tokens, accepted, drafts, None, chosen)


def _positions(part: DecodeBatch) -> TokenPositions:
    """Positions of the newest tokens and their drafts; -1 where there is none."""
    newest = part.positions[:, None]
    ahead = jnp.arange(part.tokens.shape[1], dtype=jnp.int32)[None]
    return TokenPositions(jnp.where((newest < 0) | (part.tokens < 0), -1, newest + ahead))


def _accepted(part: DecodeBatch, tokens: Int[Array, "B T"]) -> Int[Array, " B"]:
    """Number of drafts, from the first on, that equal the token sampled at their position."""
    right = (part.tokens[:, 1:] == tokens[:, :-1]) & (part.positions[:, None] >= 0)
    return jnp.sum(jnp.cumprod(right.astype(jnp.int32), axis=1), axis=1)


def _draft(
    step: _Step,
    main: Decoded,
    tokens: Int[Array, "B T"],
    accepted: Int[Array, " B"],
    positions: TokenPositions,
    cached: Rows,
) -> tuple[Int[Array, "B k"], list[Decoded]]:
    """Drafts as many tokens as were verified: the first from the model's own hidden states, each further one
    from the MTP layer's state of the one before.

    Args:
      step: Arguments of the whole step.
      main: The decoder's results for the verified positions.
      tokens: Token sampled after each position.
      accepted: Number of correct drafts.
      positions: The verified positions.
      cached: Cached rows of the MTP layer.

    Returns:
      The drafts, and the results of the MTP layer for each; the rows of the first are to be cached.
    """
    weights, c, tensor = step.weights, step.c, step.tensor
    index = jnp.arange(tokens.shape[1], dtype=jnp.int32)[None]
    positions = TokenPositions(jnp.where(index <= accepted[:, None], positions.positions, -1))
    hidden, next_, drafts, modules = main.hidden, tokens, [], []
    first = positions.positions[:, :1]
    newest = jnp.where(first < 0, -1, first + accepted[:, None])
    for ahead in range(tokens.shape[1] - 1):
        attend = step.attention(positions, read_cache=partial(_same, cached))
        stream = Stream(next_, positions.positions >= 0, attend)
        state = mtp_hidden(weights, c, hidden, stream, step.run, tensor)
        cached = paged.insert(cached, positions.addresses, jax.tree.map(lambda a: a[0], state.rows))
        hidden = state.hidden
        if not ahead:
            hidden = jnp.take_along_axis(hidden, accepted[:, None, None], axis=1)
        next_ = greedy(logits(hidden, weights, tensor))
        positions = TokenPositions(jnp.where(newest < 0, -1, newest + 1 + ahead))
        drafts.append(next_)
        modules.append(state)
    return jnp.concatenate(drafts, axis=1), modules


def _same(rows: Rows, layer: Array) -> Rows:
    del layer
    return rows
