"""Memory of one rank of a layout by purpose, computed from shapes before anything is compiled."""

import math

import jax
import jax.numpy as jnp

from cmx_jax.analysis.trace.abstract_steps import PAGE_WIDTH
from cmx_jax.mesh.exchange import message_bytes
from cmx_jax.mesh.layout import Layout
from cmx_jax.mesh.specs import entry_axes
from cmx_jax.model.cache import abstract_cache, cache_dtype
from cmx_jax.model.config import ModelConfig
from cmx_jax.model.leaf import Leaf, leaf_dtype
from cmx_jax.model.sharding import laid_out, leaf_spec, shared_in_slots


def part(leaf: Leaf) -> str:
    """Returns the purpose that a weight is counted under."""
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
    """Returns the bytes of a page of `width` tokens, in all layers together, with scales.

    Args:
      c: Configuration of the model.
      width: Tokens per page.
      kv_cache_dtype: A name in `cmx_jax.model.cache.KV_CACHE_DTYPES`; `auto` is bfloat16.
      mtp: True if the MTP layer has rows too.
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
    """Returns the bytes that one rank needs by purpose: weights, pages, and buffers of the token exchange.

    Floats are bfloat16. The exchange's buffers are mailboxes; for `allgather`, which has none, the tokens of
    all ranks and the sums that are scattered; under `auto` the rows of all slots.

    Args:
      c: Configuration of the model; its INT8 fields count as such.
      layout: Layout of the model on its ranks.
      batch: Sequences per data rank.
      length: Tokens of each sequence, whose pages are kept.
      prefill: True if a step gets whole sequences, False if it gets one token and the drafts of each.
      drafts: MTP drafts; with any, the MTP layer is loaded.
      kv_cache_dtype: Type of the pages, a name in `cmx_jax.model.cache.KV_CACHE_DTYPES`.
    """
    memory: dict[str, int] = {}
    leaves: list[Leaf] = []
    laid_out(c, layout, leaves.append, drafts > 0)
    for leaf in leaves:
        names = tuple(name for entry in leaf_spec(c, leaf, layout) for name in entry_axes(entry))
        size = math.prod(leaf.shape) // layout.size(names) * leaf_dtype(leaf, jnp.bfloat16).itemsize
        memory[part(leaf)] = memory.get(part(leaf), 0) + size
    pages = batch * -(-length // PAGE_WIDTH)
    memory["cache"] = pages * page_bytes(c, PAGE_WIDTH, kv_cache_dtype, drafts > 0)
    tokens = batch * length // layout.sequence_ranks if prefill else batch * (1 + drafts)
    tokens //= layout.microbatches
    copies = c.num_experts_per_tok + shared_in_slots(c, layout)
    gathers = layout.exchange == "allgather"
    # ranks with the same tokens send each other none
    peers = layout.size(tuple(axis for axis in layout.experts if axis in (*layout.data, *layout.sequence)))
    rows = (layout.slots if layout.auto else peers) * (tokens if gathers else layout.rows(tokens, copies))
    message = c.hidden_size * 2 if layout.auto else message_bytes(c.hidden_size, layout.wire)
    if c.num_moe_layers and (peers > 1 or not gathers):
        memory["dispatch buffer"] = rows * message
        memory["combine buffer"] = rows * c.hidden_size * (4 if gathers else 2)
    return memory
