"""A checkpoint's pieces as INT8: as they are stored, or rounded while they are loaded."""

import math

import numpy as np

from cmx_jax.model.checkpoint.names import Piece
from cmx_jax.model.checkpoint.source import Checkpoint
from cmx_jax.model.leaf import Leaf, leaf_dtype
from cmx_jax.quant.weights import channel_scale, quantize


class Int8Pieces:
    """Reads a field's numbers and then its scales, each piece once."""

    def __init__(self, checkpoint: Checkpoint):
        self.checkpoint = checkpoint
        self._scales: dict[Piece, np.ndarray] = {}

    def fill(self, leaf: Leaf, piece: Piece, out: np.ndarray) -> None:
        """Writes what a leaf of kind `int8` or `scale` holds of a piece; `int8` comes first."""
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
        of_channel = tuple(1 if axis in leaf.inputs else n for axis, n in enumerate(out.shape))
        self._scales[piece] = scale.reshape(of_channel).astype(dtype)
