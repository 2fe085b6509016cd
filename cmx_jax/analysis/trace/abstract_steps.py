"""Traces steps of a model of any size from shapes alone: no weights, cache or batch is allocated."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.layout import Format
from jax.experimental.layout import Layout as MemoryLayout
from jax.sharding import Mesh

from cmx_jax.mesh.layout import Layout
from cmx_jax.mesh.runners import Abstract
from cmx_jax.model.batch import DecodeBatch, PrefillBatch
from cmx_jax.model.cache import PagedCache, abstract_cache, cache_dtype
from cmx_jax.model.config import ModelConfig
from cmx_jax.model.decode import decode_step
from cmx_jax.model.prefill import prefill_step
from cmx_jax.model.sampling import Sampling
from cmx_jax.model.sharding import abstract_weights
from cmx_jax.model.steps import step_specs
from cmx_jax.quant.rows import Int8Rows

PAGE_WIDTH = 128


def _batch(make: Any, rows: tuple[int, ...], tokens: tuple[int, ...], pages: int, prefill: bool) -> Any:
    """Returns a batch of shapes.

    Args:
      make: Function that makes an array from a type and sizes.
      rows: Shape of the arrays with one element for each sequence.
      tokens: Shape of the arrays with one element for each token.
      pages: Number of pages of a sequence.
      prefill: True for a prefill batch, False for a decode batch.
    """
    sampling = Sampling(
        make("float32", *rows), make("int32", *rows), make("float32", *rows), make("uint32", *rows)
    )
    table = make("int32", rows[0], pages)
    if not prefill:
        return DecodeBatch(make("int32", *tokens), make("int32", *rows), table, sampling)
    token, sequence = make("int32", *tokens), make("int32", *rows)
    return PrefillBatch(token, token, token, token, table, sequence, sequence, sampling)


def trace_step(
    c: ModelConfig,
    layout: Layout,
    step: str,
    *,
    sequences: int,
    context: int,
    length: int = 0,
    drafts: int = 0,
    dtype: str = "bfloat16",
    kv_cache_dtype: str = "auto",
    mesh: Mesh | None = None,
    in_order: bool = False,
) -> Any:
    """Traces a greedy step of an instance.

    Args:
      c: Configuration of the model.
      layout: Layout of the model on the instance.
      step: `decode` or `prefill`.
      sequences: Sequences per data rank: rows of the decode batch, or prompts with a row each.
      context: Tokens of each sequence that the cache has room for.
      length: Tokens of each prompt (prefill).
      drafts: MTP drafts that are verified (decode); in prefill the MTP layer runs if there are any.
      dtype: Type of weights, and of the cache unless `kv_cache_dtype` gives it another.
      kv_cache_dtype: A name in `cmx_jax.model.cache.KV_CACHE_DTYPES`.
      mesh: Mesh of devices to compile for, which may be those of a topology that is not present; None for an
        abstract mesh.
      in_order: Keeps the cache in memory in the order of its axes. The TPU compiler would choose another
        order for an argument, and copy the whole cache from and to it in every step.

    Returns:
      The traced step, a `jax.stages.Traced`.
    """
    runner = Abstract(layout.axes, mesh)
    specs, pages = step_specs(c, layout, drafts > 0), -(-context // PAGE_WIDTH)
    rows = sequences * layout.data_ranks

    def make(kind: str, *shape: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, jnp.dtype(kind))

    if step == "prefill":
        fn, ins, outs = (
            partial(prefill_step, c=c, layout=layout, sampled=False, cached=False),
            specs.prefill,
            specs.prefilled,
        )
        batch = _batch(make, (rows, 1), (rows, length), -(-length // PAGE_WIDTH), prefill=True)
    else:
        fn, ins, outs = partial(decode_step, c=c, layout=layout, sampled=False), specs.data, specs.decoded  # type: ignore[assignment]
        batch = _batch(make, (rows,), (rows, 1 + drafts), pages, prefill=False)
    weights = abstract_weights(c, layout, dtype, drafts > 0)
    cached_dtype = cache_dtype(kv_cache_dtype, dtype)
    cache = abstract_cache(c, rows * pages, PAGE_WIDTH, cached_dtype, drafts > 0)
    in_specs = (specs.weights, specs.data, ins)
    placed = [runner.put(tree, spec) for tree, spec in zip((weights, cache, batch), in_specs, strict=True)]
    program = runner.jit(fn, in_specs, (specs.data, outs), (1,), layout.auto)
    if in_order:
        pinned = _pinned(placed[1])
        placed[1] = jax.tree.map(
            lambda a, to: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=to), placed[1], pinned
        )
        program = jax.jit(program, donate_argnums=(1,), out_shardings=(pinned, None))
    return program.trace(*placed)


def _pinned(cache: PagedCache) -> PagedCache:
    """Returns memory formats that keep a placed cache in the order of its axes.

    Scales are kept token after token, since a TPU would pad the few scales of one token to 128.
    """
    rows, scales = (
        Format(MemoryLayout(order), cache.rows.sharding) for order in ((0, 1, 2, 3), (0, 1, 3, 2))
    )
    return PagedCache(Int8Rows(rows, scales) if isinstance(cache.pages, Int8Rows) else rows)
