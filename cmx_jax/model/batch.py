"""What goes into a step and what comes out, and how a batch is cut into microbatches."""

from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from flax import struct

from cmx_jax.errors import CmxError
from cmx_jax.mesh.layout import Layout
from cmx_jax.model.config import ModelConfig
from cmx_jax.model.gshard import masked
from cmx_jax.model.moe import MoEStats, RunExperts, exchanged
from cmx_jax.model.sharding import shared_in_slots


@struct.dataclass
class PrefillBatch:
    """Prompts, or chunks of them, packed into rows.

    `B` rows of `T` tokens and `S` addresses, in which up to `N` sequences stand behind each other, each
    from a page's beginning on. Under a layout with `sequence` axes the ranks share each row's tokens.
    """

    tokens: Any  # [B, T] int32
    positions: Any  # [B, T] int32: in its sequence; -1: padding
    begin: Any  # [B, T] int32: the address of position 0 of its sequence
    following: Any  # [B, T] int32: the token behind each; -1 behind the last of a prompt
    page_table: Any  # [B, pages] int32
    last: Any  # [B, N] int32: index in `T` of each sequence's last token; -1: none
    lengths: Any  # [B, N] int32: tokens of each sequence up to that one
    sampling: Any  # Sampling [B, N]


@struct.dataclass
class DecodeBatch:
    """The newest token of each running sequence and `k` that are drafted behind it."""

    tokens: Any  # [B, 1 + k] int32; -1: nothing is drafted
    positions: Any  # [B] int32: where the newest token stands; -1: an empty row
    page_table: Any  # [B, pages] int32
    sampling: Any  # Sampling [B]


@struct.dataclass
class StepOutput:
    """What a step made of each sequence; None where there is no such thing.

    Attributes:
      tokens: `[B, 1 + k]`, of which the first `1 + accepted` count (prefill: `[B, N]`, one a sequence).
      accepted: `[B]`, how many drafts were right.
      drafts: `[B, k]`, of what follows (prefill: `[B, N]`).
      stats: of each MoE layer, MTP's last, and rank; summed over microbatches.
      logprobs: of each of `tokens`.
    """

    tokens: Any
    accepted: Any
    drafts: Any
    stats: Any  # MoEStats
    logprobs: Any = None  # Logprobs [B, 1 + k]


Rows = TypeVar("Rows")


def split(batch: Rows, parts: int) -> list[Rows]:
    """Cuts the rows of a batch into microbatches.

    Raises:
      CmxError: they do not divide.
    """
    rows = jax.tree.leaves(batch)[0].shape[0]
    if rows % parts:
        raise CmxError(f"{rows} rows a rank do not divide into {parts} microbatches, expected a multiple")
    size = rows // parts
    return [jax.tree.map(lambda a, i=i: a[i * size : (i + 1) * size], batch) for i in range(parts)]


def joined(parts: list[Rows], axis: int = 0) -> Rows:
    """Microbatches, or layers, as one again."""
    return jax.tree.map(lambda *a: jnp.concatenate(a, axis), *parts)


def by_rank(stats: list[MoEStats | None]) -> MoEStats | None:
    """Sum over microbatches, with an axis for the rank behind that of the layer."""
    return jax.tree.map(lambda *a: sum(a)[:, None], *stats)


def run_experts(c: ModelConfig, layout: Layout, tokens: int) -> RunExperts:
    """How `tokens` tokens of a program reach their experts under a layout."""
    rows = layout.rows(tokens // layout.groups, c.num_experts_per_tok + shared_in_slots(c, layout))
    return masked(layout, rows) if layout.auto else exchanged(layout, rows)
