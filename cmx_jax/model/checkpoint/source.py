"""What every checkpoint format gives: pieces, and what is known of how they are stored."""

from typing import Protocol, runtime_checkable

import numpy as np

from cmx_jax.model.checkpoint.names import Piece
from cmx_jax.model.config import ModelConfig


@runtime_checkable
class Checkpoint(Protocol):
    """What every format gives.

    Attributes:
      config: the model.
      mtp: whether its MTP layers are stored.
      wide: fields (stack and path) of which something is stored in more digits than bfloat16 has.
      int8: fields that are stored as INT8 with a scale for each output channel, and the type of the scales.
    """

    config: ModelConfig
    mtp: bool

    @property
    def wide(self) -> frozenset[tuple[str, str]]: ...

    @property
    def int8(self) -> tuple[frozenset[tuple[str, str]], str]: ...

    def fill(self, piece: Piece, out: np.ndarray) -> None:
        """Writes a piece into `out`, which has its shape and the wanted type."""
        ...

    def fill_int8(self, piece: Piece, q: np.ndarray, scale: np.ndarray) -> bool:
        """Writes a piece that is stored as INT8 as it is, a scale for each number; False if it is not."""
        ...


class FloatsOnly:
    """The part of a `Checkpoint` that stores nothing as INT8."""

    int8: tuple[frozenset[tuple[str, str]], str] = (frozenset(), "bfloat16")

    def fill_int8(self, piece: Piece, q: np.ndarray, scale: np.ndarray) -> bool:
        """See `Checkpoint`."""
        return False
