"""The paged cache of one rank.

Per token and layer it keeps one row: of MLA the latent and the rotated key, of GQA all heads' keys and
values. `C` here is the length of a row (`ModelConfig.row_dim`). A page holds `W` tokens of all layers, so
that a sequence moves as whole pages:

    pages [P, L, W, C]      page_table [B, pages of a batch row]: address s of row b lies in
                            page_table[b, s // W], row s % W

A batch row's addresses 0 to S - 1 hold one sequence, or several that are packed behind each other, each
from a page's beginning on. A step reads the pages as they were before it and puts its own rows in at once,
of all layers, when it is done: so no layer, and no microbatch, waits for another one's writing.

A table entry of `NO_PAGE` is no page: writes to it are dropped, reads give zeros. Rows beyond a
sequence's length may hold anything, NaN included; readers mask them.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Array, Float, Int

from cmx_jax.model.config import ModelConfig

NO_PAGE = int(np.iinfo(np.int32).max)


@struct.dataclass
class PagedCache:
    pages: Any  # [P, L, W, C]

    @property
    def width(self) -> int:
        """Tokens of a page, `W`."""
        return self.pages.shape[2]


def abstract_cache(c: ModelConfig, pages: int, width: int, dtype: Any, mtp: bool = False) -> PagedCache:
    """Shape of a cache of `pages` pages of `width` tokens; `mtp`: of the MTP layer too, behind the others."""
    shape = (pages, c.num_hidden_layers + mtp, width, c.row_dim)
    return PagedCache(jax.ShapeDtypeStruct(shape, jnp.dtype(dtype)))


def write(
    cache: PagedCache,
    page_table: Int[Array, "B P"],
    addresses: Int[Array, "B T"],
    rows: Float[Array, "L B T C"],
) -> PagedCache:
    """Puts each token's rows, one of each layer, at its address. Address -1 is written nowhere."""
    slot = jnp.where(addresses < 0, 0, addresses // cache.width)
    page = jnp.take_along_axis(page_table, slot, axis=1, mode="fill", fill_value=NO_PAGE)
    page = jnp.where(addresses < 0, NO_PAGE, page)
    at = cache.pages.at[page, : rows.shape[0], addresses % cache.width]
    return PagedCache(at.set(jnp.moveaxis(rows, 0, 2).astype(cache.pages.dtype), mode="drop"))


def read(
    cache: PagedCache, layer: Int[Array, ""] | int, page_table: Int[Array, "B P"]
) -> Float[Array, "B S C"]:
    """All rows of one layer in order of address, `S = pages of a batch row * W`."""
    rows = cache.pages.at[page_table, layer].get(mode="fill", fill_value=0)
    return rows.reshape(page_table.shape[0], -1, cache.pages.shape[-1])


def insert(
    held: Float[Array, "B S C"], addresses: Int[Array, "B T"], rows: Float[Array, "B T C"]
) -> Float[Array, "B S C"]:
    """What was read, with new rows at their addresses; those at -1 or behind `S` go nowhere."""
    at = jnp.where(addresses < 0, held.shape[1], addresses)
    each = jnp.arange(held.shape[0], dtype=jnp.int32)[:, None]
    return held.at[each, at].set(rows.astype(held.dtype), mode="drop")


def take_pages(cache: PagedCache, ids: Int[Array, " N"]) -> Float[Array, "N L W C"]:
    """Copies whole pages out, to be moved to another cache; `NO_PAGE` gives zeros."""
    return cache.pages.at[ids].get(mode="fill", fill_value=0)


def put_pages(cache: PagedCache, ids: Int[Array, " N"], pages: Float[Array, "N L W C"]) -> PagedCache:
    """Copies whole pages in; `NO_PAGE` drops."""
    return PagedCache(cache.pages.at[ids].set(pages.astype(cache.pages.dtype), mode="drop"))
