"""Attention of any family, as a decoder layer calls it: from normed hidden states back to the model's width.

Two ways to spread it over ranks. `data_parallel_attention`: each rank attends for its own sequences, with all
heads or, under tensor parallelism, with its own heads. `sequence_parallel_attention`: the ranks share every
sequence, by tokens and then by heads (SP-TP-SP, section 4.3.1).
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Bool, Float, Int

from cmx_jax.mesh.exchange import Axis, gather, psum_if
from cmx_jax.model import cache as paged
from cmx_jax.model import gqa, mla
from cmx_jax.model.cache import Rows
from cmx_jax.model.config import GQAConfig, LayerKind, ModelConfig
from cmx_jax.model.layers import add_bias, visible
from cmx_jax.model.weights import GQA, MLA
from cmx_jax.quant import einsum

Attend = Callable[
    [Int[Array, ""], LayerKind, Float[Array, "B T D"], MLA | GQA],
    tuple[Float[Array, "B T D"], Rows],
]
"""(layer number, its kind, hidden states, weights) -> (attention output before the residual, new rows in the
cache's format)."""

ReadCache = Callable[[Int[Array, ""]], Rows]
"""Layer number -> the layer's cached rows of a batch. Rows that no token sees may hold anything."""


@struct.dataclass
class TokenPositions:
    """Positions of tokens, and the addresses at which their sequences begin.

    Attributes:
      positions: Position of each token in its sequence, int32 `[B, T]`; -1 for padding.
      begin: Address of position 0 of each token's sequence, int32 `[B, T]`; None is 0 for all.
    """

    positions: Any
    begin: Any = None

    @property
    def addresses(self) -> Int[Array, "B T"]:
        """Address of each token's row; -1 for padding."""
        if self.begin is None:
            return self.positions
        return jnp.where(self.positions < 0, -1, self.begin + self.positions)


def masks(tokens: TokenPositions, span: int, c: ModelConfig) -> dict[bool, Bool[Array, "B T S"]]:
    """Masks of the addresses 0 to `span - 1` that each token sees, by whether a layer is chunked."""
    a, positions, begin = c.attention, tokens.positions, tokens.begin
    if not isinstance(a, GQAConfig):
        return {False: visible(positions, span, begin=begin)}
    return {
        chunked: visible(positions, span, a.chunk_size if chunked else None, a.sliding_window, begin)
        for chunked in {kind.chunked for kind in c.layers} | {False}
    }


def data_parallel_attention(
    tokens: TokenPositions,
    span: int,
    c: ModelConfig,
    read_cache: ReadCache | None = None,
    absorbed: bool = False,
    kv_dtype: Any = None,
    tensor: Axis = (),
) -> Attend:
    """Attention of a rank to its own sequences.

    Args:
      tokens: Positions of the new tokens.
      span: Number of addresses `S` of a batch row.
      c: The model.
      read_cache: Reader of the cached rows; None if nothing is cached, and each token's address is its index.
      absorbed: True if MLA attends in latent space, which is cheaper for few tokens.
      kv_dtype: Type in which rows are cached, and therefore seen; None leaves them as they are.
      tensor: Axes of ranks that have the same sequences, and each some of the heads.
    """
    layer_masks, positions = masks(tokens, span, c), jnp.maximum(tokens.positions, 0)

    def attend(number: Any, kind: LayerKind, h: Any, w: MLA | GQA) -> tuple[Any, Any]:
        q, computed = (mla if isinstance(w, MLA) else gqa).prolog(h, positions, kind, w, c)
        rows = paged.encode_rows(computed, kv_dtype, c)
        context = rows if read_cache is None else paged.insert(read_cache(number), tokens.addresses, rows)
        context = paged.decode_rows(context, computed.dtype, c)
        mask = layer_masks[kind.chunked]
        if isinstance(w, MLA):
            out = (mla.absorbed if absorbed else mla.expanded)(q, context, mask, w, c)
        else:
            out = gqa.attend(q, context, mask, w, c)
        return project_out(out, w, tensor), rows

    return attend


def sequence_parallel_attention(
    own: TokenPositions,
    tokens: TokenPositions,
    span: int,
    c: ModelConfig,
    axis: tuple[str, ...],
    heads: tuple[str, ...],
    read_cache: ReadCache | None = None,
    kv_dtype: Any = None,
) -> Attend:
    """Attention of ranks that share their sequences: SP for the down-projections, all-gather of the latents,
    TP over heads for the up-projections and attention, all-to-all back to SP for O_proj.

    The gathered latents are `Q + C` wide where hidden states are `D` wide. The weights `q_b`, `k_b` and `v_b`
    are those of this rank's heads. The new rows that `Attend` returns are those of all tokens.

    Where there are fewer heads than ranks, heads are split over some of the axes only. Ranks that differ
    along the others have the same heads, and each group of `heads` ranks attends for its own tokens.

    Args:
      own: Positions of this rank's part of the tokens.
      tokens: Positions of all tokens.
      span: Number of addresses `S` of a batch row.
      c: The model.
      axis: Axes of the ranks that share sequences.
      heads: Axes among `axis` over which heads are split, in the same order.
      read_cache: Reader of the cached rows, see `data_parallel_attention`.
      kv_dtype: Type in which rows are cached; the latents are gathered in that type.
    """
    queries = tokens if heads == axis else jax.tree.map(partial(gather, axis=heads, dim=1), own)
    mask, query_positions = masks(queries, span, c)[False], jnp.maximum(queries.positions, 0)

    def attend(number: Any, kind: LayerKind, h: Any, w: MLA | GQA) -> tuple[Any, Any]:
        del kind
        assert isinstance(w, MLA)
        q, computed = mla.down(h, jnp.maximum(own.positions, 0), w, c)
        rows = paged.encode_rows(computed, kv_dtype, c)
        with jax.named_scope("GatherLatents"):
            q = gather(q, heads, 1)
            rows = jax.tree.map(partial(gather, axis=axis, dim=1), rows)
        context = rows if read_cache is None else paged.insert(read_cache(number), tokens.addresses, rows)
        context = paged.decode_rows(context, computed.dtype, c)
        out = mla.expanded(mla.up(q, query_positions, w, c), context, mask, w, c)
        if heads:
            with jax.named_scope("HeadsToTokens"):
                out = jax.lax.all_to_all(out, heads, 1, 2, tiled=True)
        return project_out(out, w), rows

    return attend


def project_out(out: Float[Array, "B T H V"], w: MLA | GQA, tensor: Axis = ()) -> Float[Array, "B T D"]:
    """O_proj, summed over the ranks that have heads."""
    with jax.named_scope("O_proj"):
        return add_bias(psum_if(einsum("bthv,hvd->btd", out, w.o), tensor), w.o_bias)
