"""From pieces on disk to weights in memory: each rank's shard is read by itself, and nothing else."""

from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np

from cmx_jax.errors import CmxError
from cmx_jax.mesh.layout import Layout
from cmx_jax.mesh.runners import Runner
from cmx_jax.model.checkpoint.huggingface import HuggingFace
from cmx_jax.model.checkpoint.manifest import read_manifest
from cmx_jax.model.checkpoint.names import Piece
from cmx_jax.model.config import ModelConfig
from cmx_jax.model.weights import Leaf, Weights, leaf_dtype, leaf_spec, weight_tree


@runtime_checkable
class Checkpoint(Protocol):
    """What every format gives.

    Attributes:
      config: the model.
      mtp: whether its MTP layers are stored.
      wide: fields (stack and path) of which something is stored in more digits than bfloat16 has.
    """

    config: ModelConfig
    mtp: bool

    @property
    def wide(self) -> frozenset[tuple[str, str]]: ...

    def fill(self, piece: Piece, out: np.ndarray) -> None:
        """Writes a piece into `out`, which has its shape and the wanted type."""
        ...


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
        raise CmxError(
            f"{directory}: holds a conversion that is not complete: run the same cmx convert again"
        )
    if manifest is not None and manifest.format == "orbax":
        from cmx_jax.model.checkpoint.orbax import OrbaxDirectory  # takes a second to import

        found = OrbaxDirectory(directory, manifest).check()
        if config is not None and config != found.config:
            raise CmxError(f"{directory}: its config.json is not the config that it is to be read as")
        return found
    return HuggingFace(directory, config).check()


def _span(index: slice, size: int) -> range:
    return range(*index.indices(size))


def read_field(
    checkpoint: Checkpoint, leaf: Leaf, index: tuple[slice, ...], placement: np.ndarray, dtype: Any
) -> np.ndarray:
    """The part of a field that a rank holds.

    Args:
      checkpoint: where from.
      leaf: the field.
      index: a slice for each of its axes.
      placement: slot of each expert; slots without one are zero.
      dtype: wanted.
    """
    shape = tuple(len(_span(s, n)) for s, n in zip(index, leaf.shape, strict=True))
    whole = leaf.piece_shape
    rest = index[len(index) - len(whole) :]
    uncut = shape[len(shape) - len(whole) :] == whole

    def put(piece: Piece, out: np.ndarray) -> None:
        if uncut:
            return checkpoint.fill(piece, out)
        full = np.empty(whole, dtype)
        checkpoint.fill(piece, full)
        out[...] = full[rest]
        return None

    out = np.zeros(shape, dtype) if leaf.experts else np.empty(shape, dtype)
    if not leaf.stack:
        put((leaf.stack, leaf.path, 0, 0), out)
    elif not leaf.experts:
        for i, layer in enumerate(_span(index[0], leaf.shape[0])):
            put((leaf.stack, leaf.path, layer, 0), out[i])
    else:
        expert_of_slot = {int(slot): expert for expert, slot in enumerate(placement)}
        for i, slot in enumerate(_span(index[0], leaf.shape[0])):
            for j, layer in enumerate(_span(index[1], leaf.shape[1])):
                if slot in expert_of_slot:
                    put((leaf.stack, leaf.path, layer, expert_of_slot[slot]), out[i, j])
    return out


def read_weights(directory: str | Path, c: ModelConfig, dtype: Any) -> Weights:
    """Weights of a checkpoint as NumPy arrays, expert `e` in slot `e`.

    A config that names MTP layers of which no tensor is stored loads without them (`mtp` is None).

    Raises:
      CmxError: a tensor is missing, unknown, misshapen, of another type, or not finite; it is named.
    """
    checkpoint, placement = open_checkpoint(directory, c), np.arange(c.n_routed_experts, dtype=np.int32)

    def make(leaf: Leaf) -> np.ndarray:
        if leaf.kind == "slots":
            return np.broadcast_to(placement, leaf.shape)
        index = tuple(slice(None) for _ in leaf.shape)
        return read_field(checkpoint, leaf, index, placement, leaf_dtype(leaf, dtype))

    return weight_tree(c, c.n_routed_experts, make, checkpoint.mtp)


def load_weights(checkpoint: Checkpoint, layout: Layout, runner: Runner, dtype: Any) -> Weights:
    """Weights of a checkpoint on an instance, experts in the layout's slots.

    Raises:
      CmxError: a number is not finite, or there are more experts than slots.
    """
    c = checkpoint.config
    placement = layout.placement(c.n_routed_experts)

    def make(leaf: Leaf) -> Any:
        kind = leaf_dtype(leaf, dtype)

        def part(index: tuple[slice, ...]) -> np.ndarray:
            if leaf.kind == "slots":
                return np.broadcast_to(placement, leaf.shape)[index]
            return read_field(checkpoint, leaf, index, placement, kind)

        return runner.make(leaf.shape, kind, leaf_spec(leaf, layout.experts), part)

    return weight_tree(c, layout.slots, make, checkpoint.mtp)
