"""Inputs and outputs of a step, and microbatches."""

from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from flax import struct

from cmx_jax.errors import CmxError
from cmx_jax.mesh.layout import Layout
from cmx_jax.model.config import ModelConfig
from cmx_jax.model.gshard import gspmd_masked
from cmx_jax.model.moe import MoEStats, RunExperts, expert_parallel
from cmx_jax.model.sharding import shared_in_slots


@struct.dataclass
class PrefillBatch:
    """Prompts, or chunks of them, packed into rows.

    `B` rows of `T` tokens and `S` addresses hold up to `J` sequences each, one after the other, each from the
    beginning of a page on. Under a layout with `sequence` axes the ranks share each row's tokens.
    """

    tokens: Any  # [B, T] int32
    positions: Any  # [B, T] int32: position in its sequence; -1: padding
    begin: Any  # [B, T] int32: address of position 0 of its sequence
    following: Any  # [B, T] int32: the next token of the prompt; -1 after the last one
    page_table: Any  # [B, pages] int32
    last: Any  # [B, J] int32: index in `T` of each sequence's last token; -1: no sequence
    lengths: Any  # [B, J] int32: tokens of each sequence up to and including the last one
    sampling: Any  # Sampling [B, J]


@struct.dataclass
class DecodeBatch:
    """The newest token of each running sequence, followed by `k` drafts."""

    tokens: Any  # [B, 1 + k] int32; -1: no draft
    positions: Any  # [B] int32: position of the newest token; -1: an empty row
    page_table: Any  # [B, pages] int32
    sampling: Any  # Sampling [B]


@struct.dataclass
class StepOutput:
    """Results of a step for each sequence; a field that does not apply is None.

    Attributes:
      tokens: Sampled tokens `[B, 1 + k]`, of which the first `1 + accepted` count (prefill: `[B, J]`, one a
        sequence).
      accepted: Number of correct drafts, `[B]`.
      drafts: Draft tokens for the next step, `[B, k]` (prefill: `[B, J]`).
      stats: Statistics for each MoE layer, MTP's last, and rank, summed over microbatches.
      logprobs: Logprobs of `tokens`.
    """

    tokens: Any
    accepted: Any
    drafts: Any
    stats: Any  # MoEStats
    logprobs: Any = None  # Logprobs [B, 1 + k]


Tree = TypeVar("Tree")


def split(batch: Tree, parts: int) -> list[Tree]:
    """Cuts the rows of a batch into microbatches.

    Raises:
      CmxError: The number of rows is not a multiple of `parts`.
    """
    rows = jax.tree.leaves(batch)[0].shape[0]
    if rows % parts:
        raise CmxError(f"{rows} rows a rank do not divide into {parts} microbatches, expected a multiple")
    size = rows // parts
    return [jax.tree.map(lambda a, i=i: a[i * size : (i + 1) * size], batch) for i in range(parts)]


def concatenate(parts: list[Tree], axis: int = 0) -> Tree:
    """Concatenates trees of equal structure, leaf by leaf; undoes `split`."""
    return jax.tree.map(lambda *a: jnp.concatenate(a, axis), *parts)


def sum_microbatches(stats: list[MoEStats | None]) -> MoEStats | None:
    """Sum over microbatches, with an axis for the rank after that of the layer."""
    return jax.tree.map(lambda *a: sum(a)[:, None], *stats)


def run_experts(c: ModelConfig, layout: Layout, tokens: int) -> RunExperts:
    """Returns the function that sends `tokens` tokens of a program through their experts under a layout."""
    rows = layout.rows(tokens // layout.groups, c.num_experts_per_tok + shared_in_slots(c, layout))
    return gspmd_masked(layout, rows) if layout.auto else expert_parallel(layout, rows)
