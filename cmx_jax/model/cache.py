"""The paged cache of one rank.

Per token and layer it keeps one row: of MLA the latent and the rotated key, of GQA all heads' keys and
values. `C` here is the length of a row (`ModelConfig.row_dim`). A page holds `W` tokens of all layers, so
that a sequence moves as whole pages:

    pages [P, L, W, C]      page_table [B, pages of a batch row]: address s of row b lies in
                            page_table[b, s // W], row s % W

A batch row's addresses 0 to S - 1 hold one sequence, or several that are packed behind each other, each
from a page's beginning on. A step reads the pages as they were before it and puts its own rows in at once,
of all layers, when it is done: so no layer, and no microbatch, waits for another one's writing.

Rows are kept in the model's type or a narrower one. In INT8 (`Int8Rows` in place of each array) a row's parts
have scales of their own: of MLA the latent, which is normed, and the rotated key, which is not; of GQA each
head's key and value. A step attends to its own tokens' rows as they are kept too, so that the next one, which
reads them from pages, sees the same: where a prompt is cut, or what a draft was, changes nothing.

A table entry of `NO_PAGE` is no page: writes to it are dropped, reads give zeros. Rows beyond a
sequence's length may hold anything, NaN included; readers mask them.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Array, Float, Int

from cmx_jax.errors import CmxError
from cmx_jax.model.config import ModelConfig
from cmx_jax.quant.rows import Int8Rows, dequantize_parts, quantize_parts

KV_CACHE_DTYPES = ("auto", "float32", "bfloat16", "int8")
NO_PAGE = int(np.iinfo(np.int32).max)


Rows = Float[Array, "..."] | Int8Rows
"""Rows as they are kept; with INT8, shapes are those of `q`."""


@struct.dataclass
class PagedCache:
    pages: Any  # [P, L, W, C], or Int8Rows of them

    @property
    def rows(self) -> Any:
        """The array `[P, L, W, C]`, without scales."""
        return jax.tree.leaves(self.pages)[0]

    @property
    def width(self) -> int:
        """Tokens of a page, `W`."""
        return self.rows.shape[2]

    @property
    def dtype(self) -> jnp.dtype:
        """The type in which rows are kept."""
        return self.rows.dtype


def cache_dtype(name: str, dtype: str) -> str:
    """The type in which rows are kept; `auto` is the model's `dtype`.

    Raises:
      CmxError: there is none of that name.
    """
    if name not in KV_CACHE_DTYPES:
        raise CmxError(f"kv_cache_dtype {name!r} is unknown, expected one of {list(KV_CACHE_DTYPES)}")
    return dtype if name == "auto" else name


def abstract_cache(c: ModelConfig, pages: int, width: int, dtype: Any, mtp: bool = False) -> PagedCache:
    """Shape of a cache of `pages` pages of `width` tokens; `mtp`: of the MTP layer too, behind the others."""
    shape = (pages, c.num_hidden_layers + mtp, width)
    rows = jax.ShapeDtypeStruct((*shape, c.row_dim), jnp.dtype(dtype))
    if rows.dtype != jnp.int8:
        return PagedCache(rows)
    return PagedCache(Int8Rows(rows, jax.ShapeDtypeStruct((*shape, len(c.row_parts)), jnp.float32)))


def stored(rows: Float[Array, "*N C"], dtype: Any, c: ModelConfig) -> Rows:
    """New rows as a cache of that type keeps them; None: as they are."""
    if dtype is None:
        return rows
    return quantize_parts(rows, c.row_parts) if jnp.dtype(dtype) == jnp.int8 else rows.astype(dtype)


def numbers(rows: Rows, dtype: Any, c: ModelConfig) -> Float[Array, "*N C"]:
    """What kept rows stand for: INT8 in `dtype`; others are it, in their own type."""
    return dequantize_parts(rows, c.row_parts, dtype) if isinstance(rows, Int8Rows) else rows


def write(
    cache: PagedCache,
    page_table: Int[Array, "B P"],
    addresses: Int[Array, "B T"],
    rows: Rows,
    groups: int = 1,
) -> PagedCache:
    """Puts each token's rows `[L, B, T, C]`, one of each layer, at its address; -1 is nowhere. `groups`: see
    `read`."""
    if groups > 1:
        parts = (*_cut((cache, page_table, addresses), groups), _cut(rows, groups, 1))
        return _joined(jax.vmap(write, (0, 0, 0, 1))(*parts))
    slot = jnp.where(addresses < 0, 0, addresses // cache.width)
    page = jnp.take_along_axis(page_table, slot, axis=1, mode="fill", fill_value=NO_PAGE)
    page = jnp.where(addresses < 0, NO_PAGE, page)

    def put(pages: Array, new: Array) -> Array:
        at = pages.at[page, : new.shape[0], addresses % cache.width]
        return at.set(jnp.moveaxis(new, 0, 2).astype(pages.dtype), mode="drop")

    return PagedCache(jax.tree.map(put, cache.pages, rows))


def read(
    cache: PagedCache, layer: Int[Array, ""] | int, page_table: Int[Array, "B P"], groups: int = 1
) -> Rows:
    """All rows of one layer in order of address, `[B, S, C]`, `S = pages of a batch row * W`.

    Args:
      cache: the pages.
      layer: which.
      page_table: pages of each row.
      groups: equal parts of the pages and of the rows, in each of which pages are numbered from 0: one on a
        rank, as many as ranks in a program of whole arrays. As an axis of their own the compiler splits both.
    """
    if groups > 1:
        return _joined(jax.vmap(read, (0, None, 0))(_cut(cache, groups), layer, _cut(page_table, groups)))

    def of(pages: Array) -> Array:
        rows = pages.at[page_table, layer].get(mode="fill", fill_value=0)
        return rows.reshape(page_table.shape[0], -1, pages.shape[-1])

    return jax.tree.map(of, cache.pages)


def _cut(tree: Any, groups: int, axis: int = 0) -> Any:
    """An axis as `[groups, rest]`."""
    return jax.tree.map(lambda a: a.reshape(*a.shape[:axis], groups, -1, *a.shape[axis + 1 :]), tree)


def _joined(tree: Any) -> Any:
    """The first two axes as one."""
    return jax.tree.map(lambda a: a.reshape(-1, *a.shape[2:]), tree)


def insert(held: Rows, addresses: Int[Array, "B T"], rows: Rows) -> Rows:
    """What was read, `[B, S, C]`, with new rows `[B, T, C]` at their addresses; those at -1 or behind `S` go
    nowhere."""

    def put(old: Array, new: Array) -> Array:
        at = jnp.where(addresses < 0, old.shape[1], addresses)
        each = jnp.arange(old.shape[0], dtype=jnp.int32)[:, None]
        return old.at[each, at].set(new.astype(old.dtype), mode="drop")

    return jax.tree.map(put, held, rows)


def take_pages(cache: PagedCache, ids: Int[Array, " N"]) -> Rows:
    """Copies whole pages `[N, L, W, C]` out, to be moved to another cache; `NO_PAGE` gives zeros."""
    return jax.tree.map(lambda pages: pages.at[ids].get(mode="fill", fill_value=0), cache.pages)


def put_pages(cache: PagedCache, ids: Int[Array, " N"], pages: Rows) -> PagedCache:
    """Copies whole pages `[N, L, W, C]` in; `NO_PAGE` drops."""

    def put(old: Array, new: Array) -> Array:
        return old.at[ids].set(new.astype(old.dtype), mode="drop")

    return PagedCache(jax.tree.map(put, cache.pages, pages))
