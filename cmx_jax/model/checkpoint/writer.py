"""Writes Hugging Face files: BF16, F32 or compressed-tensors INT8.

The header of a file is known beforehand, so that it is written first and then the tensors one at a time, with
no more than one in memory (the library's `save_file` needs all tensors of a file at once).
"""

import hashlib
import json
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import groupby
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from cmx_jax.model.checkpoint.huggingface import HuggingFace
from cmx_jax.model.checkpoint.names import Piece, Source, sources
from cmx_jax.model.checkpoint.source import Checkpoint, FloatsOnly
from cmx_jax.model.config import ModelConfig
from cmx_jax.model.weights import Weights, all_leaves
from cmx_jax.quant.int8_weights import channel_scale, quantize

_CODES = {"float32": "F32", "bfloat16": "BF16", "int8": "I8"}
DTYPES = tuple(_CODES)


@dataclass(frozen=True)
class Entry:
    """A tensor to be written.

    Attributes:
      name: Name in the file.
      dtype: Type, one of `DTYPES`.
      shape: Shape in the file.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return int(np.prod(self.shape, dtype=np.int64)) * np.dtype(self.dtype).itemsize


class PieceReader:
    """Reads a checkpoint's tensors in the form of the file format, experts one by one."""

    def __init__(self, checkpoint: Checkpoint):
        self.checkpoint, self._last = checkpoint, ((("", "", 0, 0), ""), np.zeros(0))
        c = checkpoint.config
        leaves = all_leaves(c, c.n_routed_experts, checkpoint.mtp)
        self.shapes: dict[tuple[str, str], tuple[int, ...]] = {
            (leaf.stack, leaf.path): leaf.piece_shape for leaf in leaves
        }

    def piece(self, piece: Piece, dtype: str) -> np.ndarray:
        """Reads a piece. The last piece is kept, since gate and up are parts of the same one."""
        if self._last[0] != (piece, dtype):
            self._last = ((("", "", 0, 0), ""), np.zeros(0))  # frees memory for the next one
            out = np.empty(self.shapes[piece[0], piece[1]], np.dtype(dtype))
            self.checkpoint.fill(piece, out)
            self._last = ((piece, dtype), out)
        return self._last[1]

    def tensor(self, parts: list[Source], dtype: str) -> np.ndarray:
        """Reads a tensor of the file format, experts one by one."""
        if isinstance(self.checkpoint, HuggingFace):  # it has the tensors in this form
            return self.checkpoint.tensor(parts[0].name, np.dtype(dtype))
        out = np.empty(parts[0].shape, np.dtype(dtype))
        for s in parts:
            s.view(out)[...] = self.piece(s.piece, dtype)[s.part]
        return out

    def slabs(self, parts: list[Source], dtype: str) -> Iterator[np.ndarray]:
        """Yields a tensor of all experts of a layer, expert by expert."""
        for _, group in groupby(parts, key=lambda s: s.piece[3]):
            expert_parts = list(group)
            stacked = expert_parts[0].stacked
            assert stacked is not None
            out = np.empty(stacked.shape[1:], np.dtype(dtype))
            for s in expert_parts:
                tensor = self.tensor([s], dtype)
                assert s.stacked is not None
                out[s.stacked.index[1:]] = tensor.T if stacked.transposed else tensor
            yield out


@dataclass(frozen=True)
class Unit:
    """The tensors of one layer, or those outside layers, to be written to one file.

    Attributes:
      name: Name of the layer, or `top`.
      tensors: Sources of each tensor.
      dtype: Type of floats; `int8` means bfloat16.
      wide: Fields that are float32.
      int8: Fields that are INT8, with a bfloat16 scale for each output channel.
    """

    name: str
    tensors: list[list[Source]]
    dtype: str
    wide: frozenset[tuple[str, str]] = frozenset()
    int8: frozenset[tuple[str, str]] = frozenset()

    @cached_property
    def entries(self) -> list[Entry]:
        """Entries in the order of the file: wide types first, which keeps them aligned."""
        entries = [entry for parts in self.tensors for entry in self._entries(parts)]
        return sorted(entries, key=lambda e: -np.dtype(e.dtype).itemsize)

    def _entries(self, parts: list[Source]) -> Iterator[Entry]:
        name, shape, stacked = parts[0].name, parts[0].shape, parts[0].stacked
        if self.quantized(parts[0]):
            yield Entry(name, "int8", shape)
            yield Entry(f"{name}_scale", "bfloat16", (shape[0], 1))
        elif stacked is not None and stacked.transposed:
            yield Entry(stacked.name, self.floats(parts[0]), stacked.shape)
        else:
            yield Entry(name, self.floats(parts[0]), shape)

    def quantized(self, s: Source) -> bool:
        """Returns whether a tensor is written as INT8."""
        return s.piece[:2] in self.int8

    def floats(self, s: Source) -> str:
        """Type of a tensor that is not INT8: float32 if it is to keep its digits."""
        if s.piece[1] == "ffn.router_bias" or s.piece[:2] in self.wide:
            return "float32"
        return "bfloat16" if self.dtype == "int8" else self.dtype

    def arrays(self, reader: PieceReader) -> Iterator[tuple[str, np.ndarray]]:
        """Yields the tensors by name; a stacked one in consecutive parts."""
        for parts in self.tensors:
            name, stacked = parts[0].name, parts[0].stacked
            if self.quantized(parts[0]):
                w = reader.tensor(parts, "float32").T
                scale = channel_scale(w)
                yield name, quantize(w, scale[None]).T
                yield f"{name}_scale", scale[:, None].astype(ml_dtypes.bfloat16)
            elif stacked is not None and stacked.transposed:
                yield from ((stacked.name, slab) for slab in reader.slabs(parts, self.floats(parts[0])))
            else:
                yield name, reader.tensor(parts, self.floats(parts[0]))


def linear(s: Source) -> bool:
    """Returns whether a tensor is the matrix of a `Linear` module other than the router and the head."""
    return len(s.shape) == 2 and s.unit != "top" and s.piece[1] != "ffn.router"


def units(
    c: ModelConfig,
    mtp: bool,
    dtype: str,
    wide: frozenset[tuple[str, str]] = frozenset(),
    int8: frozenset[tuple[str, str]] | None = None,
) -> list[Unit]:
    """Cuts a model into units: its layers, and the tensors outside layers; see `Unit`.

    Llama 4's experts are stacked unless they are INT8, since transformers reads them so in both cases.

    Args:
      c: Config of the model.
      mtp: True to include MTP layers.
      dtype: Type of most tensors, one of `DTYPES`.
      wide: Fields that are float32.
      int8: Fields that are INT8; None means all `linear` tensors if `dtype` is `int8`, else none.
    """
    tensors: dict[str, dict[str, list[Source]]] = {}
    rounded: set[tuple[str, str]] = set()
    for s in sources(c, mtp):
        rounded |= {s.piece[:2]} if dtype == "int8" and linear(s) else set()
        together = s.stacked is not None and s.stacked.transposed and dtype != "int8"
        name = s.stacked.name if together and s.stacked else s.name
        tensors.setdefault(s.unit, {}).setdefault(name, []).append(s)
    fields = frozenset(rounded) if int8 is None else int8
    return [Unit(name, list(parts.values()), dtype, wide, fields) for name, parts in tensors.items()]


def write_file(path: Path, entries: list[Entry], arrays: Iterable[tuple[str, np.ndarray]]) -> dict[str, str]:
    """Writes a safetensors file, which gets its name only once it is complete.

    Args:
      path: Path of the file.
      entries: Tensors in the order of the file.
      arrays: Name and numbers of the tensors in any order, each tensor complete or in consecutive parts.

    Returns:
      The sha256 of each tensor.
    """
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    place: dict[str, int] = {}
    ends: dict[str, int] = {}
    size = 0
    for e in entries:
        place[e.name], ends[e.name] = size, size + e.nbytes
        header[e.name] = {
            "dtype": _CODES[e.dtype],
            "shape": list(e.shape),
            "data_offsets": [size, size + e.nbytes],
        }
        size += e.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    start = 8 + len(text)
    sums = {e.name: hashlib.sha256() for e in entries}
    unfinished = path.with_name(path.name + ".unfinished")
    with unfinished.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name, array in arrays:
            data = np.ascontiguousarray(array).reshape(-1).view(np.uint8).data
            file.seek(start + place[name])
            file.write(data)
            place[name] += len(data)
            sums[name].update(data)
        assert place == ends
        file.truncate(start + size)
        file.flush()
        os.fsync(file.fileno())
    unfinished.rename(path)
    return {name: digest.hexdigest() for name, digest in sums.items()}


class InMemory(FloatsOnly):
    """Weights in memory as a checkpoint; expert `e` is in slot `e`."""

    wide: frozenset[tuple[str, str]] = frozenset()

    def __init__(self, config: ModelConfig, weights: Weights):
        self.config, self.mtp, self.weights = config, weights.mtp is not None, weights

    def fill(self, piece: Piece, out: np.ndarray) -> None:
        """Writes a piece into `out`; see `cmx_jax.model.checkpoint.source.Checkpoint`."""
        stack, path, layer, expert = piece
        field: Any = getattr(self.weights, stack) if stack else self.weights
        mtp_fields = ("enorm", "hnorm", "eh_proj", "norm")
        for part in (path if stack != "mtp" or path in mtp_fields else f"layer.{path}").split("."):
            field = getattr(field, part)
        index = (expert, layer) if path.startswith("ffn.experts.") else (layer,) if stack else ()
        out[...] = np.asarray(field[index])


def write_weights(directory: str | Path, c: ModelConfig, weights: Weights, dtype: Any = "bfloat16") -> Path:
    """Writes weights to `model.safetensors` of a directory, matrices in `dtype`; returns the file's path."""
    checkpoint = InMemory(c, weights)
    reader, parts = PieceReader(checkpoint), units(c, checkpoint.mtp, np.dtype(dtype).name)
    model = replace(parts[0], name="model", tensors=[tensor for unit in parts for tensor in unit.tensors])
    path = Path(directory) / "model.safetensors"
    path.parent.mkdir(parents=True, exist_ok=True)
    write_file(path, model.entries, model.arrays(reader))
    return path
