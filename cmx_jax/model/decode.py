"""The decode program of one rank: verify what was drafted, sample, draft again (section 4.2.4).

A step takes the newest token of each sequence and `k` drafts behind it through the model at once. At each
of the `1 + k` positions a token is sampled as if there were no drafts; those behind the first that a draft
did not foresee are void. A draft is a single token, not a distribution, so this *is* rejection sampling: a
draft is kept with the probability that the model gives it, and what replaces it has the model's
distribution without it. The text of a seed is the same with drafts and without. Then the MTP layer runs
over the kept positions and drafts what follows. All of it is one program: no host waits between the parts.
"""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from cmx_jax.errors import CmxError
from cmx_jax.mesh.exchange import Axis
from cmx_jax.mesh.layout import Layout
from cmx_jax.model import cache as paged
from cmx_jax.model.attention import Attend, Where, local
from cmx_jax.model.batch import DecodeBatch, StepOutput, by_rank, joined, run_experts, split
from cmx_jax.model.cache import PagedCache, Rows
from cmx_jax.model.config import ModelConfig
from cmx_jax.model.decoder import Decoded, Stream, decoder, logits, mtp_hidden, with_mtp
from cmx_jax.model.moe import RunExperts
from cmx_jax.model.sampling import greedy, logprobs_of, next_tokens
from cmx_jax.model.weights import Weights

MAX_DRAFTS = 16  # the MTP layer is compiled once for each


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
      sampled: whether any sequence is not greedy.
      logprobs: whether those of the tokens are returned.
    """
    if layout.sequence:
        raise CmxError("a layout whose ranks share sequences can prefill only, expected sequence=()")
    parts = split(batch, layout.microbatches)
    wheres = [Where(_positions(part)) for part in parts]
    span = batch.page_table.shape[1] * cache.width
    attention = partial(local, span=span, c=c, absorbed=True, kv_dtype=cache.dtype, tensor=layout.tensor)
    streams = []
    for part, where in zip(parts, wheres, strict=True):

        def held(layer: Array, part: DecodeBatch = part) -> Rows:
            return paged.read(cache, layer, part.page_table, layout.groups)

        attend = attention(where, held=held)
        streams.append(Stream(jnp.maximum(part.tokens, 0), where.positions >= 0, attend))
    run = run_experts(c, layout, parts[0].tokens.size)
    done, outputs = decoder(weights, c, streams, run, layout.tensor), []
    for i, part in enumerate(parts):
        out = logits(done[i].hidden, weights, layout.tensor)
        tokens = next_tokens(out, part.sampling, wheres[i].positions + 1, sampled)
        accepted, drafts = _accepted(part, tokens), None
        if weights.mtp is not None:
            held_mtp = paged.read(cache, c.num_hidden_layers, part.page_table, layout.groups)
            drafts, modules = _draft(
                weights, c, done[i], tokens, accepted, wheres[i], held_mtp, attention, run, layout.tensor
            )
            done[i] = with_mtp(done[i], modules)
        said = logprobs_of(out, tokens) if logprobs else None
        outputs.append(StepOutput(tokens, accepted, drafts, None, said))
    rows, where = joined([d.rows for d in done], axis=1), joined(wheres)
    cache = paged.write(cache, batch.page_table, where.addresses, rows, layout.groups)
    return cache, joined(outputs).replace(stats=by_rank([d.stats for d in done]))


def _positions(part: DecodeBatch) -> Int[Array, "B T"]:
    """Of the newest token and its drafts; -1 where there is none."""
    newest = part.positions[:, None]
    ahead = jnp.arange(part.tokens.shape[1], dtype=jnp.int32)[None]
    return jnp.where((newest < 0) | (part.tokens < 0), -1, newest + ahead)


def _accepted(part: DecodeBatch, tokens: Int[Array, "B T"]) -> Int[Array, " B"]:
    """How many drafts, from the first on, are what was sampled in their place."""
    right = (part.tokens[:, 1:] == tokens[:, :-1]) & (part.positions[:, None] >= 0)
    return jnp.sum(jnp.cumprod(right.astype(jnp.int32), axis=1), axis=1)


def _draft(
    weights: Weights,
    c: ModelConfig,
    main: Decoded,
    tokens: Int[Array, "B T"],
    accepted: Int[Array, " B"],
    where: Where,
    held: Rows,
    attention: Callable[..., Attend],
    run: RunExperts,
    tensor: Axis,
) -> tuple[Int[Array, "B k"], list[Decoded]]:
    """As many drafts as were verified, the first from the model's own hidden states, each further one from
    the MTP layer's state of the one before.

    Args:
      main: the verification.
      tokens: sampled behind each position.
      where: the positions.
      held: what the pages hold of the MTP layer.
      attention: `local` of this step, for want of positions and rows.
      run, tensor: of this step.

    Returns:
      The drafts, and the MTP layer's runs; the first one's rows are for the cache.
    """
    index = jnp.arange(tokens.shape[1], dtype=jnp.int32)[None]
    where = Where(jnp.where(index <= accepted[:, None], where.positions, -1))
    hidden, next_, drafts, runs = main.hidden, tokens, [], []
    newest = jnp.where(where.positions[:, :1] < 0, -1, where.positions[:, :1] + accepted[:, None])
    for ahead in range(tokens.shape[1] - 1):
        attend = attention(where, held=partial(_same, held))
        done = mtp_hidden(weights, c, hidden, Stream(next_, where.positions >= 0, attend), run, tensor)
        held = paged.insert(held, where.addresses, jax.tree.map(lambda a: a[0], done.rows))
        hidden = done.hidden
        if not ahead:
            hidden = jnp.take_along_axis(hidden, accepted[:, None, None], axis=1)
        next_ = greedy(logits(hidden, weights, tensor))
        where = Where(jnp.where(newest < 0, -1, newest + 1 + ahead))
        drafts.append(next_)
        runs.append(done)
    return jnp.concatenate(drafts, axis=1), runs


def _same(rows: Rows, layer: Array) -> Rows:
    del layer
    return rows
