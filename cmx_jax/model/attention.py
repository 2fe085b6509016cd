"""Attention of any family, as a decoder layer calls it: from normed hidden states back to the model's width.

Two ways to spread it over ranks. `local`: each rank attends for its own sequences, with all heads or, under
tensor parallelism, with its own. `staged`: the ranks share every sequence, by tokens and then by heads
(SP-TP-SP, section 4.3.1).
"""

from collections.abc import Callable
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
from cmx_jax.model.layers import biased, visible
from cmx_jax.model.weights import GQA, MLA
from cmx_jax.quant import einsum

Attend = Callable[
    [Int[Array, ""], LayerKind, Float[Array, "B T D"], MLA | GQA],
    tuple[Float[Array, "B T D"], Rows],
]
"""(number of the layer, its kind, hidden states, weights) -> what is added to them, rows as the cache keeps
them."""

Held = Callable[[Int[Array, ""]], Rows]
"""Number of a layer -> the rows that a batch's pages hold of it. Unseen rows may hold anything."""


@struct.dataclass
class Where:
    """Where tokens stand: `positions [B, T]` in their sequences (-1: padding), which begin at the addresses
    `begin [B, T]` (None: 0)."""

    positions: Any
    begin: Any = None

    @property
    def addresses(self) -> Int[Array, "B T"]:
        """Of each token's row; -1 of padding."""
        if self.begin is None:
            return self.positions
        return jnp.where(self.positions < 0, -1, self.begin + self.positions)


def masks(where: Where, span: int, c: ModelConfig) -> dict[bool, Bool[Array, "B T S"]]:
    """Which of the addresses 0 to `span - 1` each token sees, in layers that are chunked and that are not."""
    a, positions, begin = c.attention, where.positions, where.begin
    if not isinstance(a, GQAConfig):
        return {False: visible(positions, span, begin=begin)}
    return {
        chunked: visible(positions, span, a.chunk_size if chunked else None, a.sliding_window, begin)
        for chunked in {kind.chunked for kind in c.layers} | {False}
    }


def local(
    where: Where,
    span: int,
    c: ModelConfig,
    held: Held | None = None,
    absorbed: bool = False,
    kv_dtype: Any = None,
    tensor: Axis = (),
) -> Attend:
    """Attention of a rank to its own sequences.

    Args:
      where: the tokens.
      span: addresses `S` of a batch row.
      c: the model.
      held: what the pages hold; None if the tokens are all there is, each at the address of its index.
      absorbed: MLA in latent space: cheaper for few tokens.
      kv_dtype: type in which rows are kept, and so seen; None: as they are.
      tensor: axes of ranks that have the same sequences, and each some of the heads.
    """
    seen, at = masks(where, span, c), jnp.maximum(where.positions, 0)

    def attend(number: Any, kind: LayerKind, h: Any, w: MLA | GQA) -> tuple[Any, Any]:
        q, made = (mla if isinstance(w, MLA) else gqa).prolog(h, at, kind, w, c)
        rows = paged.stored(made, kv_dtype, c)
        every = rows if held is None else paged.insert(held(number), where.addresses, rows)
        every = paged.numbers(every, made.dtype, c)
        if isinstance(w, MLA):
            out = (mla.absorbed if absorbed else mla.expanded)(q, every, seen[kind.chunked], w, c)
        else:
            out = gqa.attend(q, every, seen[kind.chunked], w, c)
        return project_out(out, w, tensor), rows

    return attend


def staged(
    positions: Int[Array, "B t"],
    whole: Where,
    span: int,
    c: ModelConfig,
    axis: Axis,
    held: Held | None = None,
    kv_dtype: Any = None,
) -> Attend:
    """Attention of ranks that share their sequences: SP down, all-gather of the latents, TP over heads up
    and in attention, all-to-all back to SP for O_proj.

    The gathered latents are `Q + C` wide where hidden states are `D`. The weights `q_b`, `k_b` and `v_b`
    are of this rank's heads.

    Args:
      positions: of this rank's share of the tokens.
      whole: of all of them, as are the rows that come back.
      span: addresses `S` of a batch row.
      c: the model.
      axis: the ranks.
      held, kv_dtype: see `local`; the latents are gathered as they are kept.
    """
    seen, at = masks(whole, span, c)[False], jnp.maximum(whole.positions, 0)

    def attend(number: Any, kind: LayerKind, h: Any, w: MLA | GQA) -> tuple[Any, Any]:
        del kind
        assert isinstance(w, MLA)
        q, made = mla.down(h, jnp.maximum(positions, 0), w, c)
        rows = paged.stored(made, kv_dtype, c)
        with jax.named_scope("GatherLatents"):
            q, rows = jax.tree.map(lambda a: gather(a, axis, 1), (q, rows))
        every = rows if held is None else paged.insert(held(number), whole.addresses, rows)
        every = paged.numbers(every, made.dtype, c)
        out = mla.expanded(mla.up(q, at, w, c), every, seen, w, c)
        with jax.named_scope("HeadsToTokens"):
            out = jax.lax.all_to_all(out, axis, 1, 2, tiled=True)
        return project_out(out, w), rows

    return attend


def project_out(out: Float[Array, "B T H V"], w: MLA | GQA, tensor: Axis = ()) -> Float[Array, "B T D"]:
    """O_proj, summed over the ranks that have heads."""
    with jax.named_scope("O_proj"):
        return biased(psum_if(einsum("bthv,hvd->btd", out, w.o), tensor), w.o_bias)
