"""Orbax directories: one small Orbax checkpoint per unit, experts in the slots of a layout.

    config.json, tokenizer.json ...   as in a Hugging Face directory
    conversion.json                   layout, type, and a checksum for each tensor
    units/layers.3/                   an Orbax PyTree checkpoint (OCDBT, zarr3): path -> array
    units/layers.3.slots.0-31/        the same for some expert slots: path -> array `[32, ...]`
    units/embed/, norm/, head/        tensors outside layers

A slot is a chunk (several slots are one if they are below a MiB): a rank of this layout, or of any other,
reads only the slots that it needs. A layer is written in parts, since Orbax holds about three copies of the
arrays that it writes. Orbax writes; TensorStore, on which Orbax is built, reads.
"""

import hashlib
import shutil
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import orbax.checkpoint as ocp
import tensorstore as ts

from cmx_jax.errors import CmxError
from cmx_jax.mesh.layout import Layout
from cmx_jax.model.checkpoint.manifest import Manifest
from cmx_jax.model.checkpoint.names import Piece
from cmx_jax.model.checkpoint.source import FloatsOnly
from cmx_jax.model.checkpoint.tensor_files import fill_finite
from cmx_jax.model.checkpoint.writer import PieceReader
from cmx_jax.model.config import ModelConfig
from cmx_jax.model.families import read_config
from cmx_jax.model.leaf import Leaf
from cmx_jax.model.weights import all_leaves

MIN_CHUNK = 1 << 20  # bytes; Orbax advises against smaller chunks
PARTS = 8  # Orbax checkpoints that hold the experts of a layer


@dataclass(frozen=True)
class Array:
    """One array of a unit.

    Attributes:
      leaf: Leaf that the array is a part of.
      layer: Number of the layer in the leaf's stack.
      start: First expert slot, if the leaf has experts.
      stop: End of the expert slots.
    """

    leaf: Leaf
    layer: int
    start: int = 0
    stop: int = 0

    @property
    def shape(self) -> tuple[int, ...]:
        slots = (self.stop - self.start,) if self.leaf.experts else ()
        return (*slots, *self.leaf.piece_shape)


def _unit(c: ModelConfig, stack: str, path: str, layer: int) -> str:
    """Name of the unit that holds a leaf of one layer, without the suffix of expert slots."""
    if not stack:
        return path
    if stack == "mtp":
        return f"layers.{c.num_hidden_layers + layer}"
    numbers = [n for n, kind in enumerate(c.layers) if kind.moe == (stack == "moe")]
    return f"layers.{numbers[layer]}"


def _parts(slots: int) -> list[tuple[int, int]]:
    """Cuts slots into `PARTS` nearly equal ranges `(start, stop)`, without empty ones."""
    ends = [i * slots // PARTS for i in range(PARTS + 1)]
    return [(a, b) for a, b in pairwise(ends) if b > a]


def _units(c: ModelConfig, mtp: bool, slots: int) -> dict[str, dict[str, Array]]:
    """The arrays of each unit by path."""
    units: dict[str, dict[str, Array]] = {}
    for leaf in all_leaves(c, slots, mtp):
        for layer in range(leaf.layers if leaf.kind != "slots" else 0):
            name = _unit(c, leaf.stack, leaf.path, layer)
            if not leaf.experts:
                units.setdefault(name, {})[leaf.path] = Array(leaf, layer)
                continue
            for start, stop in _parts(slots):
                part = units.setdefault(f"{name}.slots.{start}-{stop - 1}", {})
                part[leaf.path] = Array(leaf, layer, start, stop)
    return units


class OrbaxWriter:
    """Writes units of Orbax directories for a layout."""

    def __init__(
        self,
        directory: Path,
        reader: PieceReader,
        layout: Layout,
        dtype: str,
        wide: frozenset[tuple[str, str]],
    ):
        self.directory, self.reader = directory / "units", reader
        self.dtype, self.wide = dtype, wide
        c = reader.checkpoint.config
        placement = layout.placement(c.n_routed_experts)
        self.expert_of_slot = {int(slot): expert for expert, slot in enumerate(placement)}
        self.units = _units(c, reader.checkpoint.mtp, layout.slots)

    def write(self, unit: str) -> dict[str, str]:
        """Writes a unit; returns the sha256 of each array."""
        arrays = {path: self._array(stored) for path, stored in self.units[unit].items()}
        sums = {path: hashlib.sha256(array.reshape(-1).view(np.uint8).data) for path, array in arrays.items()}
        args = {
            path: ocp.SaveArgs(
                chunk_byte_size=max(arrays[path][0].nbytes, MIN_CHUNK) if stored.leaf.experts else None,
                shard_axes=(0,) if stored.leaf.experts else (),
            )
            for path, stored in self.units[unit].items()
        }
        for leftover in self.directory.glob(f"{unit}.orbax-checkpoint-tmp*"):
            shutil.rmtree(leftover)
        target = (self.directory / unit).absolute()
        try:
            with ocp.Checkpointer(ocp.PyTreeCheckpointHandler(use_ocdbt=True, use_zarr3=True)) as saver:
                saver.save(target, args=ocp.args.PyTreeSave(arrays, save_args=args), force=True)
        except ValueError as error:  # TensorStore's exception for every refusal of the system
            reason = "the disk is full" if _lacks_space(self.directory, arrays) else str(error)[:120]
            raise CmxError(f"{target}: cannot be written ({reason}); run the same command to go on") from None
        return {path: digest.hexdigest() for path, digest in sums.items()}

    def sums(self, unit: str) -> dict[str, str]:
        """Reads a unit from disk; returns the sha256 of each array."""
        sums = {}
        for path in self.units[unit]:
            values = np.ascontiguousarray(_read(self.directory / unit, path))
            sums[path] = hashlib.sha256(values.reshape(-1).view(np.uint8).data).hexdigest()
        return sums

    def _array(self, stored: Array) -> np.ndarray:
        leaf, fill = stored.leaf, self.reader.checkpoint.fill
        wide = leaf.kind == "router_bias" or (leaf.stack, leaf.path) in self.wide
        out = np.zeros(stored.shape, np.float32 if wide else np.dtype(self.dtype))
        if not leaf.experts:
            fill((leaf.stack, leaf.path, stored.layer, 0), out)
            return out
        for slot in range(stored.start, stored.stop):
            if slot in self.expert_of_slot:
                piece = (leaf.stack, leaf.path, stored.layer, self.expert_of_slot[slot])
                fill(piece, out[slot - stored.start])
        return out


def _lacks_space(directory: Path, arrays: dict[str, np.ndarray]) -> bool:
    """Returns whether the disk has less free space than arrays take.

    TensorStore's exceptions have no error code.
    """
    existing = directory if directory.exists() else directory.parent
    return shutil.disk_usage(existing).free < sum(array.nbytes for array in arrays.values())


def _open(unit: Path, path: str) -> Any:
    base = f"file://{unit.absolute()}/"
    store = {"driver": "ocdbt", "base": base, "path": f"{path}/"}
    try:
        return ts.open({"driver": "zarr3", "kvstore": store}, open=True, read=True).result()
    except ValueError as error:
        raise CmxError(f"{unit}: array {path} cannot be opened ({str(error)[:120]})") from None


def _read(unit: Path, path: str, array: Any = None, slot: int | None = None) -> np.ndarray:
    """Reads an array of a unit, or one of its slots."""
    try:
        array = _open(unit, path) if array is None else array
        return (array if slot is None else array[slot]).read().result()
    except (ValueError, OSError) as error:
        raise CmxError(f"{unit}: array {path} cannot be read ({str(error)[:120]})") from None


class OrbaxDirectory(FloatsOnly):
    """Reads a directory that `cmx convert --format orbax` wrote, as a `Checkpoint` of `source.py`."""

    def __init__(self, directory: Path, manifest: Manifest):
        self.directory, self.config = directory, read_config(directory)
        self.mtp, self.dtype = manifest.mtp, manifest.dtype
        self.placement, self.slots = manifest.placement, manifest.slots
        self.units = _units(self.config, self.mtp, manifest.slots)
        self.wide = self._wide(manifest.wide)
        self._arrays: dict[tuple[str, str], Any] = {}

    def _wide(self, names: list[str]) -> frozenset[tuple[str, str]]:
        """Fields that are float32: those in the manifest's `names`, the router's bias, or all of them."""
        fields = {
            (a.leaf.stack, path): a.leaf for arrays in self.units.values() for path, a in arrays.items()
        }
        return frozenset(
            field
            for field, leaf in fields.items()
            if self.dtype == "float32" or leaf.kind == "router_bias" or "/".join(field) in names
        )

    def check(self) -> "OrbaxDirectory":
        """Checks that every array is there, of its shape and type; returns self.

        Raises:
          CmxError: An array is missing or wrong; the first one is named.
        """
        experts = self.config.n_routed_experts
        if sorted(set(self.placement)) != sorted(self.placement) or len(self.placement) != experts:
            raise CmxError(f"{self.directory}: its placement is not one slot for each of {experts} experts")
        for unit, arrays in self.units.items():
            for path, stored in arrays.items():
                array = self._array(unit, path)
                wide = (stored.leaf.stack, path) in self.wide
                dtype = "float32" if wide else self.dtype
                if (tuple(array.shape), array.dtype.name) != (stored.shape, dtype):
                    actual = f"{array.dtype.name} {list(array.shape)}"
                    name = f"{self.directory / 'units' / unit}: array {path}"
                    raise CmxError(f"{name} is {actual}, expected {dtype} {list(stored.shape)}")
        return self

    def _array(self, unit: str, path: str) -> Any:
        if (unit, path) not in self._arrays:
            self._arrays[unit, path] = _open(self.directory / "units" / unit, path)
        return self._arrays[unit, path]

    def fill(self, piece: Piece, out: np.ndarray) -> None:
        """Writes a piece into `out`.

        Raises:
          CmxError: The piece cannot be read, or a number is not finite.
        """
        stack, path, layer, expert = piece
        unit, index = _unit(self.config, stack, path, layer), None
        if path.startswith("ffn.experts."):
            slot = self.placement[expert]
            start, stop = next((a, b) for a, b in _parts(self.slots) if a <= slot < b)
            unit, index = f"{unit}.slots.{start}-{stop - 1}", slot - start
        directory = self.directory / "units" / unit
        values = _read(directory, path, self._array(unit, path), index)
        fill_finite(out, values, f"{directory}: array {path}")
