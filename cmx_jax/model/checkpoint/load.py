"""Loads weights from pieces on disk; each rank's shard is read by itself, and nothing else."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from cmx_jax.errors import CmxError
from cmx_jax.mesh.layout import Layout, expert_parallel
from cmx_jax.mesh.runners import Runner, aligned
from cmx_jax.mesh.specs import Part
from cmx_jax.model.checkpoint.huggingface import HuggingFace
from cmx_jax.model.checkpoint.manifest import read_manifest
from cmx_jax.model.checkpoint.names import Piece
from cmx_jax.model.checkpoint.source import Checkpoint, Int8Pieces
from cmx_jax.model.config import ModelConfig
from cmx_jax.model.leaf import Leaf, leaf_dtype
from cmx_jax.model.rebalance import initial, table_of, tables
from cmx_jax.model.sharding import laid_out, leaf_spec
from cmx_jax.model.weights import Weights


def open_checkpoint(directory: str | Path, config: ModelConfig | None = None) -> Checkpoint:
    """Opens a checkpoint and checks that every tensor is there, of the right shape and in a known scheme.

    Args:
      directory: Hugging Face or Orbax directory.
      config: Config to read the checkpoint with; None reads its `config.json`.

    Raises:
      CmxError: A tensor, file or field is wrong; it is named.
    """
    directory = Path(directory)
    manifest = read_manifest(directory)
    if manifest is not None and not manifest.complete:
        raise CmxError(f"{directory}: holds a conversion that is not complete: run the same command again")
    if manifest is not None and manifest.format == "orbax":
        from cmx_jax.model.checkpoint.orbax import OrbaxDirectory  # takes a second to import

        checkpoint = OrbaxDirectory(directory, manifest).check()
        if config is not None and config != checkpoint.config:
            raise CmxError(f"{directory}: its config.json is not the config that it is to be read as")
        return checkpoint
    return HuggingFace(directory, config).check()


def _span(index: slice, size: int) -> range:
    return range(*index.indices(size))


Fill = Callable[[Piece, np.ndarray], None]
"""Function that writes a leaf's part of a piece into an array of its shape and type."""


def read_field(
    fill: Fill,
    c: ModelConfig,
    leaf: Leaf,
    index: tuple[slice, ...],
    expert_of_slot: np.ndarray,
    dtype: Any,
) -> np.ndarray:
    """Reads the part of a field that a rank holds.

    Args:
      fill: Function that reads pieces of the field.
      c: Config of the model.
      leaf: Leaf of the field.
      index: Slice of each axis that the rank holds.
      expert_of_slot: Placement of the leaf's stack, `[L, X]` (see `cmx_jax.mesh.placement`); empty slots are
        zero.
      dtype: Type of the result.
    """
    shape = tuple(len(_span(s, n)) for s, n in zip(index, leaf.shape, strict=True))
    piece_shape = leaf.piece_shape
    rest = index[len(index) - len(piece_shape) :]
    uncut = shape[len(shape) - len(piece_shape) :] == piece_shape

    def put(read: Callable[[np.ndarray], None], out: np.ndarray) -> None:
        full = out if uncut else np.zeros(piece_shape, dtype)
        read(full)
        if not uncut:
            out[...] = full[rest]

    out = np.zeros(shape, dtype) if leaf.experts else np.empty(shape, dtype)
    if not leaf.stack:
        put(partial(fill, (leaf.stack, leaf.path, 0, 0)), out)
    elif not leaf.experts:
        for i, layer in enumerate(_span(index[0], leaf.shape[0])):
            put(partial(fill, (leaf.stack, leaf.path, layer, 0)), out[i])
    else:
        for i, slot in enumerate(_span(index[0], leaf.shape[0])):
            for j, layer in enumerate(_span(index[1], leaf.shape[1])):
                expert = int(expert_of_slot[layer, slot])
                put(partial(_fill_expert, fill, c, leaf, layer, expert), out[i, j])
    return out


def _fill_expert(fill: Fill, c: ModelConfig, leaf: Leaf, layer: int, expert: int, out: np.ndarray) -> None:
    """Reads an expert's matrix into `out`.

    Numbers after those of routed experts stand for equal shares of the shared expert's hidden width. A
    negative number stands for an empty slot, which is left as it is.
    """
    if expert < c.n_routed_experts:
        if expert >= 0:
            fill((leaf.stack, leaf.path, layer, expert), out)
        return
    axis = 0 if leaf.path.endswith("down") else -1  # axis of the hidden width
    shape, parts = list(leaf.piece_shape), c.n_shared_experts
    one_scale = leaf.kind == "scale" and axis == 0  # for the full width
    shape[axis] *= 1 if one_scale else parts
    shared = np.empty(shape, out.dtype)
    fill((leaf.stack, leaf.path.replace("experts", "shared"), layer, 0), shared)
    out[...] = shared if one_scale else np.split(shared, parts, axis)[expert - c.n_routed_experts]


def read_weights(directory: str | Path, c: ModelConfig, dtype: Any) -> Weights:
    """Reads the weights of a checkpoint as NumPy arrays, expert `e` in slot `e`.

    If the config names MTP layers but no tensor of them is stored, `mtp` of the weights is None.

    Args:
      directory: Hugging Face or Orbax directory.
      c: Config of the model.
      dtype: Type of floats.

    Raises:
      CmxError: A tensor is missing, unknown, misshapen, of another type, or not finite; it is named.
    """
    checkpoint = open_checkpoint(directory, c)
    layout = expert_parallel(1, c.n_routed_experts)
    return _filled(checkpoint, c, layout, dtype, checkpoint.mtp)


def _filled(
    checkpoint: Checkpoint,
    c: ModelConfig,
    layout: Layout,
    dtype: Any,
    mtp: bool,
    make: Callable[[Leaf, Any, Part], Any] | None = None,
) -> Weights:
    """Weights, each made by `make(leaf, dtype, part)` from parts; NumPy arrays if `make` is None."""
    placement = initial(c, layout, mtp)
    slots, pieces = tables(c, layout, placement), Int8Pieces(checkpoint)

    def field(leaf: Leaf) -> Any:
        kind = leaf_dtype(leaf, dtype)
        fill = partial(pieces.fill, leaf) if leaf.kind in ("int8", "scale") else checkpoint.fill

        def part(index: tuple[slice, ...]) -> np.ndarray:
            if leaf.kind == "slots":
                return table_of(leaf, slots)[index]
            return read_field(fill, c, leaf, index, placement.get(leaf.stack, _NONE), kind)

        return part(tuple(slice(None) for _ in leaf.shape)) if make is None else make(leaf, kind, part)

    return laid_out(c, layout, field, mtp)


_NONE = np.zeros((0, 0), np.int32)

HostParts = dict[tuple[Any, ...], np.ndarray]
"""Parts of weights on the host, by stack, path and kind of their leaf and by index."""


def load_weights(
    checkpoint: Checkpoint,
    layout: Layout,
    runner: Runner,
    dtype: Any,
    mtp: bool | None = None,
    config: ModelConfig | None = None,
    shared: HostParts | None = None,
) -> Weights:
    """Loads the weights of a checkpoint onto an instance, experts in the layout's slots.

    Args:
      checkpoint: Checkpoint to read.
      layout: Layout of the instance.
      runner: Runner of the instance.
      dtype: Type of floats.
      mtp: True to load MTP layers, False to leave them out; None loads those that are stored.
      config: The checkpoint's config with the fields that are to be INT8; None keeps all in floats.
      shared: Parts that other instances with the same layout, type and config have read, in memory that all
        of them use; new parts are added. None: nothing is kept.

    Raises:
      CmxError: A number is not finite, or the experts do not fit the slots.
    """

    c = config or checkpoint.config

    def make(leaf: Leaf, kind: Any, part: Part) -> Any:
        def kept(index: tuple[slice, ...]) -> np.ndarray:
            assert shared is not None
            key = (leaf.stack, leaf.path, leaf.kind, *((s.start, s.stop) for s in index))
            if key not in shared:
                shared[key] = aligned(part(index).astype(kind, copy=False))
            return shared[key]

        return runner.make(leaf.shape, kind, leaf_spec(c, leaf, layout), part if shared is None else kept)

    mtp = checkpoint.mtp if mtp is None else mtp
    return _filled(checkpoint, c, layout, dtype, mtp, make)
