"""The paged cache against plain arrays: every page is compared, those that must not change included."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from cmx_jax.model.cache import (
    NO_PAGE,
    PagedCache,
    abstract_cache,
    insert,
    put_pages,
    read,
    take_pages,
    write,
)
from model.small import config

PAGES, LAYERS, WIDTH, DIM = 7, 2, 4, 3
SEQUENCES, HELD = 2, 3
SPAN = HELD * WIDTH
write_, read_, insert_, take_, put_ = (jax.jit(f) for f in (write, read, insert, take_pages, put_pages))

tables = st.permutations(range(PAGES)).map(
    lambda order: np.array(order[: SEQUENCES * HELD], np.int32).reshape(SEQUENCES, HELD)
)


def stale() -> np.ndarray:
    """Pages that were never written: NaN, where zeros could hide a read."""
    return np.full((PAGES, LAYERS, WIDTH, DIM), np.nan, np.float32)


def coded(*shape: int) -> np.ndarray:
    """Numbers that are all different."""
    return np.arange(np.prod(shape), dtype=np.float32).reshape(shape)


def put_at(pages: np.ndarray, table: np.ndarray, addresses: np.ndarray, rows: np.ndarray) -> None:
    """The oracle: one token after another, in place; `rows [L, B, T, C]` of the first `L` layers."""
    for b, t in np.ndindex(addresses.shape):
        s = addresses[b, t]
        if 0 <= s < SPAN and table[b, s // WIDTH] != NO_PAGE:
            pages[table[b, s // WIDTH], : len(rows), s % WIDTH] = rows[:, b, t]


@given(tables, st.integers(1, LAYERS), st.lists(st.permutations(range(-3, SPAN + 2)), min_size=2, max_size=2))
@settings(deadline=None, max_examples=50)
def test_write_changes_only_the_addressed_rows(table, count, order) -> None:
    addresses = np.maximum(np.array(order, np.int32), -1)  # in any order, some nowhere, some past the table
    rows = coded(count, *addresses.shape, DIM)
    expected = stale()
    put_at(expected, table, addresses, rows)
    cache = write_(PagedCache(stale()), table, addresses, rows)
    np.testing.assert_array_equal(cache.pages, expected)


@given(tables, st.lists(st.integers(0, SPAN), min_size=2, max_size=2))
@settings(deadline=None, max_examples=50)
def test_read_gives_written_rows_in_order_of_address(table, lengths) -> None:
    addresses = np.broadcast_to(np.arange(SPAN, dtype=np.int32), (SEQUENCES, SPAN))
    rows, used = coded(LAYERS, SEQUENCES, SPAN, DIM), addresses < np.array(lengths)[:, None]
    cache = write_(PagedCache(stale()), table, np.where(used, addresses, -1), rows)
    for layer in range(LAYERS):
        result = np.asarray(read_(cache, layer, table))
        np.testing.assert_array_equal(result, np.where(used[..., None], rows[layer], np.nan))


@given(st.lists(st.permutations(range(-3, SPAN + 2)), min_size=2, max_size=2), st.integers(1, SPAN + 5))
@settings(deadline=None, max_examples=30)
def test_insert_equals_write_then_read(order, count) -> None:
    addresses = np.maximum(np.array(order, np.int32)[:, :count], -1)
    cached, rows = coded(SEQUENCES, SPAN, DIM), -coded(*addresses.shape, DIM) - 1
    expected = cached.copy()
    for b, t in np.argwhere((addresses >= 0) & (addresses < SPAN)):
        expected[b, addresses[b, t]] = rows[b, t]
    np.testing.assert_array_equal(insert_(cached, addresses, rows), expected)


@given(tables, st.integers(0, SPAN - 1))
@settings(deadline=None, max_examples=20)
def test_write_one_by_one_equals_write_at_once(table, length) -> None:
    rows = coded(LAYERS, SEQUENCES, length, DIM)
    cache = PagedCache(stale())
    for s in range(length):
        cache = write_(cache, table, np.full((SEQUENCES, 1), s, np.int32), rows[:, :, s : s + 1])
    np.testing.assert_array_equal(read_(cache, 1, table)[:, :length], rows[1])


@given(tables, st.lists(st.booleans(), min_size=SEQUENCES * HELD, max_size=SEQUENCES * HELD))
@settings(deadline=None, max_examples=30)
def test_absent_page_drops_writes_and_reads_zeros(table, absent) -> None:
    table = np.where(np.array(absent).reshape(table.shape), NO_PAGE, table).astype(np.int32)
    positions = np.broadcast_to(np.arange(SPAN, dtype=np.int32), (SEQUENCES, SPAN))
    rows, expected = coded(LAYERS, SEQUENCES, SPAN, DIM) + 1, stale()
    put_at(expected, table, positions, rows)
    cache = write_(PagedCache(stale()), table, positions, rows)
    np.testing.assert_array_equal(cache.pages, expected)
    present = np.repeat(table != NO_PAGE, WIDTH, axis=1)[..., None]
    np.testing.assert_array_equal(read_(cache, 0, table), np.where(present, rows[0], 0))


@given(st.permutations(range(PAGES)), st.permutations(range(PAGES)), st.integers(0, 4))
@settings(deadline=None, max_examples=30)
def test_take_and_put_pages_with_other_ids(old, new, count) -> None:
    source = coded(PAGES, LAYERS, WIDTH, DIM)
    absent = np.full(5 - count, NO_PAGE, np.int32)
    ids, places = (np.append(np.array(order[:count], np.int32), absent) for order in (old, new))
    taken = take_(PagedCache(source), ids)
    np.testing.assert_array_equal(taken[:count], source[old[:count]])
    np.testing.assert_array_equal(taken[count:], 0)
    expected = stale()
    expected[new[:count]] = source[old[:count]]
    np.testing.assert_array_equal(put_(PagedCache(stale()), places, taken).pages, expected)


def test_narrow_cache_rounds_rows() -> None:
    table, positions = np.array([[2]], np.int32), np.array([[0, 1]], np.int32)
    latents = np.array([[[1.001, -3.3, 1e-5], [0.1, 200.7, 7.0]]], np.float32)
    rows = np.stack([latents * 0, latents])
    cache = PagedCache(jnp.zeros((PAGES, LAYERS, WIDTH, DIM), jnp.bfloat16))
    cache = write_(cache, table, positions, rows)
    assert cache.pages.dtype == jnp.bfloat16
    np.testing.assert_array_equal(read_(cache, 1, table)[:, :2], latents.astype(ml_dtypes.bfloat16))
    moved = put_(cache, np.array([0], np.int32), np.full((1, LAYERS, WIDTH, DIM), 1.001, np.float32))
    np.testing.assert_array_equal(moved.pages[0], np.ones((LAYERS, WIDTH, DIM), ml_dtypes.bfloat16))


def test_page_has_rows_of_all_layers() -> None:
    cache = abstract_cache(config(), pages=5, width=16, dtype="bfloat16")
    assert cache.pages.shape == (5, 3, 16, 18 + 8)
    assert abstract_cache(config(), 5, 16, "bfloat16", mtp=True).pages.shape == (5, 4, 16, 18 + 8)
    assert (cache.width, cache.pages.dtype) == (16, jnp.bfloat16)
