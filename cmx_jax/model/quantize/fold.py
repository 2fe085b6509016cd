"""What matrices of a layer can give to each other without changing what the layer computes (section 4.5).

A layer is its pieces by path, expert by expert where there are experts. Everything is folded into weights:
the program that serves them is the same.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from cmx_jax.model.config import MLAConfig, ModelConfig
from cmx_jax.quant.rotate import fold_norm, rotate_inputs, rotate_outputs, rotation

Pieces = dict[str, Any]
"""Arrays by path; a `QTensor` where one is served in INT8."""


@dataclass(frozen=True)
class Link:
    """Inputs that can be scaled: `readers` take a scale for each input, `writer` its inverse.

    Attributes:
      writer: a norm, or the matrix whose outputs are the inputs.
      readers: matrices to become INT8.
      floats: what reads the same inputs and stays as it is; where the router does, so do the experts.
    """

    writer: str
    readers: tuple[str, ...]
    floats: tuple[str, ...] = ()


def links(c: ModelConfig, pieces: Pieces) -> Iterator[Link]:
    """The links within a layer, but for its experts'."""
    mla = isinstance(c.attention, MLAConfig)
    projections = ("attn.q_a", "attn.kv_a") if "attn.q_a" in pieces else ("attn.q_b", "attn.kv_a")
    first = projections if mla else ("attn.q", "attn.k", "attn.v")
    ffn = tuple(path for path in ("ffn.gate_up", "ffn.shared.gate_up") if path in pieces)
    router = ("ffn.router",) if "ffn.router" in pieces else ()
    if c.block == "parallel":
        yield Link("attn_norm", first + ffn, router)
    else:
        yield Link("attn_norm", first)
        yield Link("ffn_norm", ffn, router)
    if "attn.q_a" in pieces:
        yield Link("attn.q_norm", ("attn.q_b",))
    if mla:  # of grouped heads several read the same values
        yield Link("attn.v_b", ("attn.o",))
    for path in ("ffn", "ffn.shared"):
        if f"{path}.gate_up" in pieces:
            yield Link(f"{path}.gate_up", (f"{path}.down",))


def input_axes(path: str) -> int:
    """How many of the first axes of a piece are its inputs."""
    return 2 if path == "attn.o" else 1


def matrix(path: str, piece: np.ndarray) -> np.ndarray:
    """A piece as `[I, O]`."""
    return piece.reshape(math.prod(piece.shape[: input_axes(path)]), -1)


def scale_readers(pieces: Pieces, paths: tuple[str, ...], s: np.ndarray) -> None:
    """Multiplies the weights of each input by its scale, `s [I]`."""
    for path in paths:
        if path == "ffn.router":  # [E, D]
            pieces[path] = pieces[path] * s
        elif path in pieces:
            pieces[path] = (matrix(path, pieces[path]) * s[:, None]).reshape(pieces[path].shape)


def scale_writer(pieces: Pieces, path: str, s: np.ndarray) -> None:
    """Divides what is written by its reader's scale."""
    w = pieces[path]
    if path == "attn.v_b":  # [H, V, A]
        pieces[path] = w / s.reshape(*w.shape[:2], 1)
    elif path.endswith("gate_up"):  # [D, 2, F]: only up is a factor of what is read
        pieces[path] = np.stack([w[:, 0], w[:, 1] / s], axis=1)
    else:
        pieces[path] = w / s


def rotate(c: ModelConfig, pieces: Pieces, int8: frozenset[str]) -> None:
    """Rotates what lies between two matrices, or between them and a norm whose weight can be folded: MLA's
    query latent, and every head's values; where what reads it becomes INT8.

    The hidden states are not rotated: an MTP layer reads them behind the final norm, whose weight could then
    not be folded.
    """
    if {"attn.q_a", "attn.q_b"} <= pieces.keys() and "attn.q_b" in int8 and "attn.q_a_bias" not in pieces:
        r = rotation(pieces["attn.q_norm"].shape[0])
        q_b, folded = (
            pieces["attn.q_b"],
            fold_norm(pieces["attn.q_norm"], matrix("attn.q_b", pieces["attn.q_b"])),
        )
        pieces["attn.q_a"] = _f32(rotate_outputs(pieces["attn.q_a"], r))
        pieces["attn.q_b"] = _f32(rotate_inputs(folded, r)).reshape(q_b.shape)
        pieces["attn.q_norm"] = np.ones_like(pieces["attn.q_norm"])
    if "attn.o" in int8:
        mla = isinstance(c.attention, MLAConfig)
        _rotate_values(pieces, *(("attn.v_b", 1) if mla else ("attn.v", 2)))


def _rotate_values(pieces: Pieces, path: str, axis: int) -> None:
    """`v` and `o` in rotated coordinates of each head, the same for all."""
    r = rotation(pieces[path].shape[axis])
    pieces[path] = _f32(np.moveaxis(np.moveaxis(pieces[path], axis, -1) @ r, -1, axis))
    if f"{path}_bias" in pieces:
        pieces[f"{path}_bias"] = _f32(pieces[f"{path}_bias"] @ r)
    pieces["attn.o"] = _f32(np.einsum("vr,hvd->hrd", r, pieces["attn.o"]))


def _f32(x: np.ndarray) -> np.ndarray:
    return x.astype(np.float32)
