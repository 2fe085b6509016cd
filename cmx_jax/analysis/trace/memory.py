"""What one rank of a layout keeps in memory, by what for: from shapes, before anything is compiled."""

import math

import jax
import jax.numpy as jnp

from cmx_jax.analysis.trace.steps import PAGE_WIDTH
from cmx_jax.mesh.exchange import message_bytes
from cmx_jax.mesh.layout import Layout
from cmx_jax.model.cache import abstract_cache, cache_dtype
from cmx_jax.model.config import ModelConfig
from cmx_jax.model.leaf import Leaf, leaf_dtype
from cmx_jax.model.sharding import laid_out, leaf_spec, shared_in_slots


def part(leaf: Leaf) -> str:
    """What a weight is counted under."""
    if leaf.stack == "mtp":
        return "MTP layer"
    if leaf.experts:
        return "experts"
    if leaf.path in ("embed", "head"):
        return "embedding, head"
    if leaf.path.startswith("attn."):
        return "attention"
    return "dense FFN" if leaf.stack == "dense" else "shared experts, routers, norms"


def page_bytes(c: ModelConfig, width: int, kv_cache_dtype: str, mtp: bool = False) -> int:
    """Bytes of a page of `width` tokens: of all layers, scales included.

    Args:
      c: the model.
      width: tokens of the page.
      kv_cache_dtype: a name in `cmx_jax.model.cache.KV_CACHE_DTYPES`; `auto` is bfloat16.
      mtp: whether the MTP layer has rows too.
    """
    page = abstract_cache(c, 1, width, cache_dtype(kv_cache_dtype, "bfloat16"), mtp)
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(page))


def by_layout(
    c: ModelConfig,
    layout: Layout,
    batch: int,
    length: int,
    prefill: bool,
    drafts: int = 1,
    kv_cache_dtype: str = "auto",
) -> dict[str, int]:
    """Bytes that one rank needs, by what for: weights, pages, and what the token exchange fills.

    Floats are bfloat16. The exchange's buffers are mailboxes; of `allgather`, which has none, all ranks'
    tokens, and the sums that are scattered; under `auto` places in all slots.

    Args:
      c: the model; its INT8 fields count as such.
      layout: how it lies on its ranks.
      batch: sequences of a data rank.
      length: tokens of each, whose pages are kept.
      prefill: whether a step is given whole sequences, or one token and the drafts of each.
      drafts: MTP drafts; with any of them the MTP layer is there.
      kv_cache_dtype: of the pages.
    """
    found: dict[str, int] = {}
    leaves: list[Leaf] = []
    laid_out(c, layout, leaves.append, drafts > 0)
    for leaf in leaves:
        axes = [axis for axis in leaf_spec(leaf, layout) if axis]
        names = tuple(name for axis in axes for name in ((axis,) if isinstance(axis, str) else axis))
        size = math.prod(leaf.shape) // layout.size(names) * leaf_dtype(leaf, jnp.bfloat16).itemsize
        found[part(leaf)] = found.get(part(leaf), 0) + size
    pages = batch * -(-length // PAGE_WIDTH)
    found["cache"] = pages * page_bytes(c, PAGE_WIDTH, kv_cache_dtype, drafts > 0)
    tokens = batch * length // layout.sequence_ranks if prefill else batch * (1 + drafts)
    tokens //= layout.microbatches
    copies = c.num_experts_per_tok + shared_in_slots(c, layout)
    gathers = layout.exchange == "allgather"
    # ranks that have the same tokens send each other none
    peers = layout.size(tuple(axis for axis in layout.experts if axis in (*layout.data, *layout.sequence)))
    rows = (layout.slots if layout.auto else peers) * (tokens if gathers else layout.rows(tokens, copies))
    message = c.hidden_size * 2 if layout.auto else message_bytes(c.hidden_size, layout.wire)
    if c.num_moe_layers and (peers > 1 or not gathers):
        found["dispatch buffer"] = rows * message
        found["combine buffer"] = rows * c.hidden_size * (4 if gathers else 2)
    return found
