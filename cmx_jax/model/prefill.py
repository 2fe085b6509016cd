"""The prefill program of one rank, and that which scores whole sequences."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from cmx_jax.errors import CmxError
from cmx_jax.mesh.exchange import gather
from cmx_jax.mesh.layout import Layout
from cmx_jax.model import cache as paged
from cmx_jax.model.attention import Attend, Where, local, staged
from cmx_jax.model.batch import PrefillBatch, StepOutput, by_rank, joined, run_experts, split
from cmx_jax.model.cache import PagedCache, Rows
from cmx_jax.model.config import ModelConfig
from cmx_jax.model.decoder import Stream, decoder, logits, mtp_hidden, with_mtp
from cmx_jax.model.sampling import greedy, logprobs_of, next_tokens
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
      sampled: whether any sequence is not greedy.
      cached: whether pages hold earlier chunks to attend to. If not, each token stands at the address that is
        its index.
      logprobs: whether those of the first tokens are returned.
    """
    parts = split(batch, layout.microbatches)
    wheres = [_whole(Where(part.positions, part.begin), layout) for part in parts]
    attends = [_attend(*of, cache, c, layout, cached) for of in zip(parts, wheres, strict=True)]
    run = run_experts(c, layout, parts[0].tokens.size)
    streams = [
        Stream(part.tokens, part.positions >= 0, attend) for part, attend in zip(parts, attends, strict=True)
    ]
    done, outputs = decoder(weights, c, streams, run, layout.tensor), []
    for i, (part, stream) in enumerate(zip(parts, streams, strict=True)):
        out = logits(_at_ends(part, done[i].hidden, layout), weights, layout.tensor)
        tokens, drafts = next_tokens(out, part.sampling, part.lengths, sampled), None
        said = logprobs_of(out, tokens) if logprobs else None
        if weights.mtp is not None:
            behind = Stream(_following(part, tokens, layout), stream.active, stream.attend)
            mtp = mtp_hidden(weights, c, done[i].hidden, behind, run, layout.tensor)
            drafts = greedy(logits(_at_ends(part, mtp.hidden, layout), weights, layout.tensor))
            done[i] = with_mtp(done[i], [mtp])
        outputs.append(StepOutput(tokens, None, drafts, None, said))
    rows, where = joined([d.rows for d in done], axis=1), joined(wheres)
    cache = paged.write(cache, batch.page_table, where.addresses, rows, layout.groups)
    return cache, joined(outputs).replace(stats=by_rank([d.stats for d in done]))


def _attend(
    part: PrefillBatch, whole: Where, cache: PagedCache, c: ModelConfig, layout: Layout, cached: bool
) -> Attend:
    def read(layer: Any) -> Rows:
        return paged.read(cache, layer, part.page_table, layout.groups)

    held = read if cached else None
    span = part.page_table.shape[1] * cache.width if cached else whole.positions.shape[1]
    if not layout.sequence:
        return local(whole, span, c, held, kv_dtype=cache.dtype, tensor=layout.tensor)
    return staged(part.positions, whole, span, c, layout.sequence, held, cache.dtype)


def _whole(where: Where, layout: Layout) -> Where:
    """Of all tokens of the rows, where ranks share them."""
    return jax.tree.map(lambda a: gather(a, layout.sequence, 1), where) if layout.sequence else where


def _index(part: PrefillBatch, layout: Layout) -> tuple[Array, Array]:
    """Where this rank holds the last token of each sequence `[B, N]`, and whether it does."""
    first = 0
    if layout.sequence:
        first = jax.lax.axis_index(layout.sequence) * part.tokens.shape[1]
    index = part.last - first
    return index, (part.last >= 0) & (index >= 0) & (index < part.tokens.shape[1])


def _at_ends(part: PrefillBatch, hidden: Float[Array, "B T D"], layout: Layout) -> Float[Array, "B N D"]:
    """The hidden state of each sequence's last token, on all ranks that share it."""
    index, here = _index(part, layout)
    found = jnp.take_along_axis(hidden, jnp.where(here, index, 0)[:, :, None], axis=1)
    found = jnp.where(here[:, :, None], found, jnp.zeros((), found.dtype))
    return jax.lax.psum(found, layout.sequence) if layout.sequence else found


def _following(part: PrefillBatch, tokens: Int[Array, "B N"], layout: Layout) -> Int[Array, "B T"]:
    """The token behind each: the next of the prompt, and behind its last the one that was sampled."""
    index, here = _index(part, layout)
    index = jnp.where(here, index, part.tokens.shape[1])
    sampled = jax.vmap(lambda row, at, new: row.at[at].set(new, mode="drop"))(part.following, index, tokens)
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
    """Float32 logits of every position, without a cache; `kv_dtype`: as one of that type would give them."""
    if layout.sequence:
        raise CmxError("a layout whose ranks share sequences can prefill only, expected sequence=()")
    positions = jnp.arange(tokens.shape[1], dtype=jnp.int32)[None]
    where = Where(jnp.where(positions < lengths[:, None], positions, -1))
    attend = local(where, tokens.shape[1], c, kv_dtype=kv_dtype, tensor=layout.tensor)
    stream, run = Stream(tokens, where.positions >= 0, attend), run_experts(c, layout, tokens.size)
    [done] = decoder(weights, c, [stream], run, layout.tensor)
    return logits(done.hidden, weights, layout.tensor)
