"""The paged cache of one rank.

It keeps one row per token and layer: for MLA the latent and the rotated key, for GQA the keys and values of
all heads. `C` is the length of a row (`ModelConfig.row_dim`). A page holds `W` tokens of all layers, so that
a sequence moves as whole pages:

    pages [P, L, W, C]      page_table [B, pages of a batch row]: address s of row b lies in
                            page_table[b, s // W], row s % W

The addresses 0 to S - 1 of a batch row hold one sequence, or several that are packed one after the other,
each from the beginning of a page on. A step reads the pages as they were before it and writes its own rows,
of all layers at once, at its end: so no layer, and no microbatch, waits for the writes of another one.

Rows are kept in the model's type or a narrower one. In INT8 (`Int8Rows` in place of each array) the parts of
a row have scales of their own: for MLA the latent, which is normed, and the rotated key, which is not; for
GQA the key and value of each head. A step attends to its own tokens' rows in the type of the cache too. The
next step, which reads them from pages, then sees the same: where a prompt is cut, or what a draft was,
changes nothing.

A table entry of `NO_PAGE` is no page: writes to it are dropped, reads give zeros. Rows beyond the end of a
sequence may hold anything, NaN included; readers mask them.
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
"""Rows in the type of the cache. For INT8, the shapes in this file are those of `q`."""


@struct.dataclass
class PagedCache:
    """The pages of one rank, or of all ranks of an instance one after the other."""

    pages: Any  # [P, L, W, C], or Int8Rows of them

    @property
    def rows(self) -> Any:
        """The array `[P, L, W, C]`, without scales."""
        return jax.tree.leaves(self.pages)[0]

    @property
    def width(self) -> int:
        """Tokens per page, `W`."""
        return self.rows.shape[2]

    @property
    def dtype(self) -> jnp.dtype:
        """Type of the cached rows."""
        return self.rows.dtype


def cache_dtype(name: str, dtype: str) -> str:
    """Type of the cached rows; `auto` is the model's `dtype`.

    Raises:
      CmxError: The name is unknown.
    """
    if name not in KV_CACHE_DTYPES:
        raise CmxError(f"kv_cache_dtype {name!r} is unknown, expected one of {list(KV_CACHE_DTYPES)}")
    return dtype if name == "auto" else name


def abstract_cache(c: ModelConfig, pages: int, width: int, dtype: Any, mtp: bool = False) -> PagedCache:
    """Shapes of a cache of `pages` pages of `width` tokens; `mtp` adds the MTP layer after the others."""
    shape = (pages, c.num_hidden_layers + mtp, width)
    rows = jax.ShapeDtypeStruct((*shape, c.row_dim), jnp.dtype(dtype))
    if rows.dtype != jnp.int8:
        return PagedCache(rows)
    return PagedCache(Int8Rows(rows, jax.ShapeDtypeStruct((*shape, len(c.row_parts)), jnp.float32)))


def encode_rows(rows: Float[Array, "... C"], dtype: Any, c: ModelConfig) -> Rows:
    """Converts computed rows to the type of a cache; None leaves them as they are."""
    if dtype is None:
        return rows
    return quantize_parts(rows, c.row_parts) if jnp.dtype(dtype) == jnp.int8 else rows.astype(dtype)


def decode_rows(rows: Rows, dtype: Any, c: ModelConfig) -> Float[Array, "... C"]:
    """Dequantises INT8 rows to `dtype`; other rows are returned in their own type."""
    return dequantize_parts(rows, c.row_parts, dtype) if isinstance(rows, Int8Rows) else rows


def write(
    cache: PagedCache,
    page_table: Int[Array, "B pages"],
    addresses: Int[Array, "B T"],
    rows: Rows,
    groups: int = 1,
) -> PagedCache:
    """Writes the rows `[L, B, T, C]` of each token, one per layer, to its address; rows at -1 are dropped.

    `groups` is the number of equal parts of the pages and of the batch rows, as in `read`.
    """
    if groups > 1:
        parts = (*_cut((cache, page_table, addresses), groups), _cut(rows, groups, 1))
        return _merge(jax.vmap(write, (0, 0, 0, 1))(*parts))
    slot = jnp.where(addresses < 0, 0, addresses // cache.width)
    page = jnp.take_along_axis(page_table, slot, axis=1, mode="fill", fill_value=NO_PAGE)
    page = jnp.where(addresses < 0, NO_PAGE, page)

    def put(pages: Array, new: Array) -> Array:
        target = pages.at[page, : new.shape[0], addresses % cache.width]
        return target.set(jnp.moveaxis(new, 0, 2).astype(pages.dtype), mode="drop")

    return PagedCache(jax.tree.map(put, cache.pages, rows))


def read(
    cache: PagedCache, layer: Int[Array, ""] | int, page_table: Int[Array, "B pages"], groups: int = 1
) -> Rows:
    """All rows of one layer in order of address, `[B, S, C]`, `S = pages of a batch row * W`.

    Args:
      cache: The pages.
      layer: Number of the layer.
      page_table: Pages of each batch row.
      groups: Number of equal parts of the pages and of the batch rows; each part numbers its pages from 0. It
        is 1 on a rank, and the number of ranks in a program of whole arrays: the compiler splits both along
        this axis.
    """
    if groups > 1:
        return _merge(jax.vmap(read, (0, None, 0))(_cut(cache, groups), layer, _cut(page_table, groups)))

    def take(pages: Array) -> Array:
        rows = pages.at[page_table, layer].get(mode="fill", fill_value=0)
        return rows.reshape(page_table.shape[0], -1, pages.shape[-1])

    return jax.tree.map(take, cache.pages)


def _cut(tree: Any, groups: int, axis: int = 0) -> Any:
    """Splits an axis in two, `[groups, rest]`."""
    return jax.tree.map(lambda a: a.reshape(*a.shape[:axis], groups, -1, *a.shape[axis + 1 :]), tree)


def _merge(tree: Any) -> Any:
    """Merges the first two axes."""
    return jax.tree.map(lambda a: a.reshape(-1, *a.shape[2:]), tree)


def insert(cached: Rows, addresses: Int[Array, "B T"], rows: Rows) -> Rows:
    """Puts new rows `[B, T, C]` at their addresses among cached ones `[B, S, C]`, and returns all `S`.

    Rows at -1 or beyond `S` are dropped.
    """

    def put(old: Array, new: Array) -> Array:
        columns = jnp.where(addresses < 0, old.shape[1], addresses)
        batch_rows = jnp.arange(old.shape[0], dtype=jnp.int32)[:, None]
        return old.at[batch_rows, columns].set(new.astype(old.dtype), mode="drop")

    return jax.tree.map(put, cached, rows)


def take_pages(cache: PagedCache, ids: Int[Array, " moved"]) -> Rows:
    """Copies whole pages `[moved, L, W, C]` out, to be moved to another cache; `NO_PAGE` gives zeros."""
    return jax.tree.map(lambda pages: pages.at[ids].get(mode="fill", fill_value=0), cache.pages)


def put_pages(cache: PagedCache, ids: Int[Array, " moved"], pages: Rows) -> PagedCache:
    """Copies whole pages `[moved, L, W, C]` in; pages for `NO_PAGE` are dropped."""

    def put(old: Array, new: Array) -> Array:
        return old.at[ids].set(new.astype(old.dtype), mode="drop")

    return PagedCache(jax.tree.map(put, cache.pages, pages))
