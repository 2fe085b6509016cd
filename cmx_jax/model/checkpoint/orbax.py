"""Orbax directories: small Orbax checkpoints, layer by layer, experts in the slots of a layout.

    config.json, tokenizer.json ...   as in a Hugging Face directory
    conversion.json                   what was written: layout, type, a checksum for each tensor
    units/layers.3/                   an Orbax PyTree checkpoint (OCDBT, zarr3): path -> array
    units/layers.3.slots.0-31/        the same of some expert slots: path -> array `[32, ...]`
    units/top/                        embedding, final norm, head

Slots are stored in chunks of one (of several where they are below a MiB): a rank of this layout, or of any
other, reads the slots that it needs. A layer is written in parts, since Orbax holds about three copies of
what it writes. Orbax writes; TensorStore, on which Orbax is built, reads.
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
from cmx_jax.model.checkpoint.writer import PieceReader
from cmx_jax.model.config import ModelConfig
from cmx_jax.model.families import read_config
from cmx_jax.model.weights import Leaf, leaf_dtype, weight_tree

MIN_CHUNK = 1 << 20  # Orbax advises against smaller ones
PARTS = 8  # Orbax checkpoints that the experts of a layer are cut into


@dataclass(frozen=True)
class Stored:
    """One array of a unit: a leaf of one layer, of experts the slots from `start` to `stop`."""

    leaf: Leaf
    layer: int
    start: int = 0
    stop: int = 0

    @property
    def shape(self) -> tuple[int, ...]:
        shape = self.leaf.shape
        if self.leaf.experts:
            return (self.stop - self.start, *shape[2:])
        return shape[1:] if self.leaf.stack else shape


def _number(c: ModelConfig, stack: str, layer: int) -> str:
    """The unit of a layer of a stack."""
    if not stack:
        return "top"
    if stack == "mtp":
        return f"layers.{c.num_hidden_layers + layer}"
    numbers = [n for n, kind in enumerate(c.layers) if kind.moe == (stack == "moe")]
    return f"layers.{numbers[layer]}"


def _parts(slots: int) -> list[tuple[int, int]]:
    """Slots in nearly equal runs."""
    ends = [i * slots // PARTS for i in range(PARTS + 1)]
    return [(a, b) for a, b in pairwise(ends) if b > a]


def _units(c: ModelConfig, mtp: bool, slots: int) -> dict[str, dict[str, Stored]]:
    """The arrays of each unit by their path."""
    leaves: list[Leaf] = []
    weight_tree(c, slots, leaves.append, mtp)
    found: dict[str, dict[str, Stored]] = {}
    for leaf in leaves:
        if leaf.kind == "slots":
            continue
        layers = 1 if not leaf.stack else leaf.shape[1 if leaf.experts else 0]
        for layer in range(layers):
            name = _number(c, leaf.stack, layer)
            if not leaf.experts:
                found.setdefault(name, {})[leaf.path] = Stored(leaf, layer)
                continue
            for start, stop in _parts(slots):
                part = found.setdefault(f"{name}.slots.{start}-{stop - 1}", {})
                part[leaf.path] = Stored(leaf, layer, start, stop)
    return found


class OrbaxWriter:
    """Writes units for a layout."""

    def __init__(self, directory: Path, reader: PieceReader, layout: Layout, dtype: str):
        self.directory, self.reader, self.dtype = directory / "units", reader, dtype
        c = reader.checkpoint.config
        placement = layout.placement(c.n_routed_experts)
        self.expert_of_slot = {int(slot): expert for expert, slot in enumerate(placement)}
        self.units = _units(c, reader.checkpoint.mtp, layout.slots)

    def write(self, unit: str) -> dict[str, str]:
        """Writes one; returns each array's sha256."""
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
        with ocp.Checkpointer(ocp.PyTreeCheckpointHandler(use_ocdbt=True, use_zarr3=True)) as saver:
            where = (self.directory / unit).absolute()
            saver.save(where, args=ocp.args.PyTreeSave(arrays, save_args=args), force=True)
        return {path: digest.hexdigest() for path, digest in sums.items()}

    def sums(self, unit: str) -> dict[str, str]:
        """What is on disk, summed again."""
        found = {}
        for path in self.units[unit]:
            values = np.ascontiguousarray(_open(self.directory / unit, path).read().result())
            found[path] = hashlib.sha256(values.reshape(-1).view(np.uint8).data).hexdigest()
        return found

    def _array(self, stored: Stored) -> np.ndarray:
        leaf, fill = stored.leaf, self.reader.checkpoint.fill
        out = np.zeros(stored.shape, leaf_dtype(leaf, self.dtype))
        if not leaf.experts:
            fill((leaf.stack, leaf.path, stored.layer, 0), out)
            return out
        for slot in range(stored.start, stored.stop):
            if slot in self.expert_of_slot:
                piece = (leaf.stack, leaf.path, stored.layer, self.expert_of_slot[slot])
                fill(piece, out[slot - stored.start])
        return out


def _open(unit: Path, path: str) -> Any:
    base = f"file://{unit.absolute()}/"
    store = {"driver": "ocdbt", "base": base, "path": f"{path}/"}
    try:
        return ts.open({"driver": "zarr3", "kvstore": store}, open=True, read=True).result()
    except ValueError as error:
        raise CmxError(f"{unit}: array {path} cannot be opened ({str(error)[:120]})") from None


class OrbaxDirectory:
    """Reads what `cmx convert --format orbax` wrote: see `cmx_jax.model.checkpoint.load.Checkpoint`."""

    def __init__(self, directory: Path, manifest: Manifest):
        self.directory, self.config = directory, read_config(directory)
        self.mtp, self.dtype = manifest.mtp, manifest.dtype
        self.placement, self.slots = manifest.placement, manifest.slots
        self.units = _units(self.config, self.mtp, manifest.slots)
        self._arrays: dict[tuple[str, str], Any] = {}

    def check(self) -> "OrbaxDirectory":
        """Refuses the directory unless every array is there, of its shape and type; names the first."""
        experts = self.config.n_routed_experts
        if sorted(set(self.placement)) != sorted(self.placement) or len(self.placement) != experts:
            raise CmxError(f"{self.directory}: its placement is not one slot for each of {experts} experts")
        for unit, arrays in self.units.items():
            for path, stored in arrays.items():
                array, dtype = self._array(unit, path), np.dtype(leaf_dtype(stored.leaf, self.dtype)).name
                if (tuple(array.shape), array.dtype.name) != (stored.shape, dtype):
                    given = f"{array.dtype.name} {list(array.shape)}"
                    where = f"{self.directory / 'units' / unit}: array {path}"
                    raise CmxError(f"{where} is {given}, expected {dtype} {list(stored.shape)}")
        return self

    def _array(self, unit: str, path: str) -> Any:
        if (unit, path) not in self._arrays:
            self._arrays[unit, path] = _open(self.directory / "units" / unit, path)
        return self._arrays[unit, path]

    def fill(self, piece: Piece, out: np.ndarray) -> None:
        """Writes a piece into `out`.

        Raises:
          CmxError: it cannot be read, or a number is not finite.
        """
        stack, path, layer, expert = piece
        unit, at = _number(self.config, stack, layer), None
        if path.startswith("ffn.experts."):
            slot = self.placement[expert]
            start, stop = next((a, b) for a, b in _parts(self.slots) if a <= slot < b)
            unit, at = f"{unit}.slots.{start}-{stop - 1}", slot - start
        where = f"{self.directory / 'units' / unit}: array {path}"
        try:
            array = self._array(unit, path)
            values = (array if at is None else array[at]).read().result()
        except (ValueError, OSError) as error:
            raise CmxError(f"{where} cannot be read ({str(error)[:120]})") from None
        with np.errstate(over="ignore"):
            out[...] = values.astype(out.dtype, copy=False)
        if not np.isfinite(out).all():
            raise CmxError(f"{where} holds NaN or infinity as {out.dtype}, expected finite numbers")
