"""From pieces on disk to weights in memory: each rank's shard is read by itself, and nothing else."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from cmx_jax.errors import CmxError
from cmx_jax.mesh.layout import Layout, expert_parallel
from cmx_jax.mesh.runners import Runner
from cmx_jax.mesh.specs import Part
from cmx_jax.model.checkpoint.huggingface import HuggingFace
from cmx_jax.model.checkpoint.int8 import Int8Pieces
from cmx_jax.model.checkpoint.manifest import read_manifest
from cmx_jax.model.checkpoint.names import Piece
from cmx_jax.model.checkpoint.source import Checkpoint
from cmx_jax.model.config import ModelConfig
from cmx_jax.model.leaf import Leaf, leaf_dtype
from cmx_jax.model.rebalance import initial, table_of, tables
from cmx_jax.model.sharding import laid_out, leaf_spec
from cmx_jax.model.weights import Weights


def open_checkpoint(directory: str | Path, config: ModelConfig | None = None) -> Checkpoint:
    """A checkpoint, checked: every tensor is there, of the right shape, stored in a way that is understood.

    Args:
      directory: a Hugging Face or Orbax directory.
      config: what it is to be read as; None reads its `config.json`.

    Raises:
      CmxError: it is not; the tensor, file or field is named.
    """
    directory = Path(directory)
    manifest = read_manifest(directory)
    if manifest is not None and not manifest.complete:
        raise CmxError(f"{directory}: holds a conversion that is not complete: run the same command again")
    if manifest is not None and manifest.format == "orbax":
        from cmx_jax.model.checkpoint.orbax import OrbaxDirectory  # takes a second to import

        found = OrbaxDirectory(directory, manifest).check()
        if config is not None and config != found.config:
            raise CmxError(f"{directory}: its config.json is not the config that it is to be read as")
        return found
    return HuggingFace(directory, config).check()


def _span(index: slice, size: int) -> range:
    return range(*index.indices(size))


Fill = Callable[[Piece, np.ndarray], None]
"""Writes what a leaf holds of a piece into an array of its shape and type."""


def read_field(
    fill: Fill,
    c: ModelConfig,
    leaf: Leaf,
    index: tuple[slice, ...],
    expert_of_slot: np.ndarray,
    dtype: Any,
) -> np.ndarray:
    """The part of a field that a rank holds.

    Args:
      fill: reads pieces of it.
      c: the model.
      leaf: the field.
      index: a slice for each of its axes.
      expert_of_slot: [L, X] of its stack (see `cmx_jax.mesh.placement`); empty slots are zero.
      dtype: wanted.
    """
    shape = tuple(len(_span(s, n)) for s, n in zip(index, leaf.shape, strict=True))
    whole = leaf.piece_shape
    rest = index[len(index) - len(whole) :]
    uncut = shape[len(shape) - len(whole) :] == whole

    def put(read: Callable[[np.ndarray], None], out: np.ndarray) -> None:
        full = out if uncut else np.zeros(whole, dtype)
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
    """An expert's matrix; one behind the routed ones is a share of the shared expert's hidden width."""
    if expert < c.n_routed_experts:
        if expert >= 0:
            fill((leaf.stack, leaf.path, layer, expert), out)
        return
    axis = 0 if leaf.path.endswith("down") else -1  # where the hidden width lies
    shape, parts = list(leaf.piece_shape), c.n_shared_experts
    one_scale = leaf.kind == "scale" and axis == 0  # for the whole width
    shape[axis] *= 1 if one_scale else parts
    both = np.empty(shape, out.dtype)
    fill((leaf.stack, leaf.path.replace("experts", "shared"), layer, 0), both)
    out[...] = both if one_scale else np.split(both, parts, axis)[expert - c.n_routed_experts]


def read_weights(directory: str | Path, c: ModelConfig, dtype: Any) -> Weights:
    """Weights of a checkpoint as NumPy arrays, expert `e` in slot `e`.

    A config that names MTP layers of which no tensor is stored loads without them (`mtp` is None).

    Raises:
      CmxError: a tensor is missing, unknown, misshapen, of another type, or not finite; it is named.
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
    """Weights of which `make(leaf, dtype, part)` makes each from its parts; None takes the NumPy arrays."""
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


def load_weights(
    checkpoint: Checkpoint,
    layout: Layout,
    runner: Runner,
    dtype: Any,
    mtp: bool | None = None,
    config: ModelConfig | None = None,
) -> Weights:
    """Weights of a checkpoint on an instance, experts in the layout's slots.

    Args:
      checkpoint: where from.
      layout: of the instance.
      runner: of the instance.
      dtype: of what is floats.
      mtp: whether its MTP layers too; None takes those that are stored.
      config: the checkpoint's with what is to be INT8; None: nothing is.

    Raises:
      CmxError: a number is not finite, or the experts do not fit the slots.
    """

    def make(leaf: Leaf, kind: Any, part: Part) -> Any:
        return runner.make(leaf.shape, kind, leaf_spec(leaf, layout), part)

    mtp = checkpoint.mtp if mtp is None else mtp
    return _filled(checkpoint, config or checkpoint.config, layout, dtype, mtp, make)
