"""Attention of any family, chosen by its weights: what a decoder layer calls.

query, rows = prolog(...)         rows go to the cache
out = prefill(query, rows, ...)   over rows at hand
out = decode(query, rows, ...)    over rows read from pages, of which some may be rubbish
x = project_out(out, ...)
"""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from cmx_jax.model import gqa, mla
from cmx_jax.model.config import GQAConfig, LayerKind, ModelConfig
from cmx_jax.model.layers import biased, visible
from cmx_jax.model.weights import GQA, MLA


def prolog(
    x: Float[Array, "B T D"], positions: Int[Array, "B T"], kind: LayerKind, w: MLA | GQA, c: ModelConfig
) -> tuple[Any, Float[Array, "B T C"]]:
    """The queries, and the row of each token that the cache keeps."""
    if isinstance(w, MLA):
        return mla.prolog(x, positions, kind, w, c)
    return gqa.prolog(x, positions, kind, w, c)


def masks(positions: Int[Array, "B T"], span: int, c: ModelConfig) -> dict[bool, Bool[Array, "B T S"]]:
    """Which of the positions 0 to `span - 1` each token sees, in layers that are chunked and that are not."""
    a = c.attention
    if not isinstance(a, GQAConfig):
        return {False: visible(positions, span)}
    return {
        chunked: visible(positions, span, a.chunk_size if chunked else None, a.sliding_window)
        for chunked in {kind.chunked for kind in c.layers}
    }


def prefill(
    q: Any, rows: Float[Array, "B S C"], mask: Bool[Array, "B T S"], w: MLA | GQA, c: ModelConfig
) -> Float[Array, "B T H V"]:
    """Attention with many queries a row: MLA expanded. Every row must be finite."""
    return mla.expanded(q, rows, mask, w, c) if isinstance(w, MLA) else gqa.attend(q, rows, mask, w, c)


def decode(
    q: Any, rows: Float[Array, "B S C"], mask: Bool[Array, "B T S"], w: MLA | GQA, c: ModelConfig
) -> Float[Array, "B T H V"]:
    """Attention with few queries a row: MLA absorbed. Rows that no query sees may hold anything."""
    return mla.absorbed(q, rows, mask, w, c) if isinstance(w, MLA) else gqa.attend(q, rows, mask, w, c)


def project_out(out: Float[Array, "B T H V"], w: MLA | GQA) -> Float[Array, "B T D"]:
    """O_proj."""
    with jax.named_scope("O_proj"):
        return biased(jnp.einsum("bthv,hvd->btd", out, w.o), w.o_bias)
