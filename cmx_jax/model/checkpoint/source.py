"""The interface of all checkpoint formats, their pieces as INT8, and a digest of a checkpoint's files.

A checkpoint gives *pieces* (see `cmx_jax.model.checkpoint.names`) and says how they are stored.
"""

import hashlib
import math
from pathlib import Path
from typing import Protocol, runtime_checkable

import numpy as np

from cmx_jax.errors import CmxError
from cmx_jax.model.checkpoint.names import Piece
from cmx_jax.model.config import ModelConfig
from cmx_jax.model.leaf import Leaf, leaf_dtype
from cmx_jax.quant.int8_weights import channel_scale, quantize

SAMPLE = 1 << 20  # bytes


@runtime_checkable
class Checkpoint(Protocol):
    """The interface of all checkpoint formats.

    Attributes:
      config: Config of the model.
      mtp: True if MTP layers are stored.
      wide: Fields (stack and path) with at least one tensor stored in more digits than bfloat16 has.
      int8: Fields stored as INT8 with a scale for each output channel, and the type of the scales.
    """

    config: ModelConfig
    mtp: bool

    @property
    def wide(self) -> frozenset[tuple[str, str]]: ...

    @property
    def int8(self) -> tuple[frozenset[tuple[str, str]], str]: ...

    def fill(self, piece: Piece, out: np.ndarray) -> None:
        """Writes a piece into `out`, which has the piece's shape and the requested type."""
        ...

    def fill_int8(self, piece: Piece, q: np.ndarray, scale: np.ndarray) -> bool:
        """Copies a piece that is stored as INT8, with a scale for each number; returns False if it is not."""
        ...


class FloatsOnly:
    """The part of a `Checkpoint` that stores nothing as INT8."""

    int8: tuple[frozenset[tuple[str, str]], str] = (frozenset(), "bfloat16")

    def fill_int8(self, piece: Piece, q: np.ndarray, scale: np.ndarray) -> bool:
        """Returns False; see `Checkpoint`."""
        return False


class Int8Pieces:
    """A checkpoint's pieces as INT8: copied if they are stored as INT8, else rounded during loading.

    A field's numbers are read first and then its scales, so that each piece is read once.
    """

    def __init__(self, checkpoint: Checkpoint):
        self.checkpoint = checkpoint
        self._scales: dict[Piece, np.ndarray] = {}

    def fill(self, leaf: Leaf, piece: Piece, out: np.ndarray) -> None:
        """Writes a leaf's part of a piece; the leaf of kind `int8` is read before the one of kind `scale`."""
        if leaf.kind == "scale":
            out[...] = self._scales[piece]
            return
        spread, dtype = np.empty(out.shape, np.float32), leaf_dtype(leaf.scale(), None)
        if self.checkpoint.fill_int8(piece, out, spread):
            first = tuple(slice(1) if axis in leaf.inputs else slice(None) for axis in range(out.ndim))
            self._scales[piece] = spread[first].astype(dtype)
            return
        self.checkpoint.fill(piece, spread)
        matrix = spread.reshape(math.prod(out.shape[: len(leaf.inputs)]), -1)
        scale = channel_scale(matrix)
        out[...] = quantize(matrix, scale[None]).reshape(out.shape)
        scale_shape = tuple(1 if axis in leaf.inputs else n for axis, n in enumerate(out.shape))
        self._scales[piece] = scale.reshape(scale_shape).astype(dtype)


def digest(directory: Path) -> str:
    """Identifies a model's weights without reading all of them: changes when they do.

    The digest is a sha256 over the names and sizes of a checkpoint's files, the contents of small files, and
    the first, a middle and the last MiB of large ones: headers of safetensors, and numbers of many tensors.

    Raises:
      CmxError: A file cannot be read.
    """
    state = hashlib.sha256()
    try:
        for path in sorted(p for p in directory.rglob("*") if p.is_file()):
            size = path.stat().st_size
            state.update(f"{path.relative_to(directory).as_posix()}\0{size}\0".encode())
            with path.open("rb") as file:
                if size <= 3 * SAMPLE:
                    state.update(file.read())
                    continue
                for offset in (0, size // 2, size - SAMPLE):
                    file.seek(offset)
                    state.update(file.read(SAMPLE))
    except OSError as error:
        raise CmxError(f"{error.filename}: cannot be read ({error.strerror})") from None
    return state.hexdigest()
