"""Carries the calibration text through a model's layers, with one layer in memory at a time."""

from collections import defaultdict
from collections.abc import Generator
from functools import lru_cache

import jax.numpy as jnp
import ml_dtypes
import numpy as np
from jaxtyping import Int

from cmx_jax.errors import CmxError
from cmx_jax.model.checkpoint.names import Source
from cmx_jax.model.checkpoint.writer import PieceReader, Unit
from cmx_jax.model.decoder import norm
from cmx_jax.model.quantize.fold import Pieces
from cmx_jax.model.quantize.layer import (
    DOWN,
    EXPERTS,
    Calibrated,
    Experts,
    Rounded,
    calibrated,
    round_piece,
)
from cmx_jax.model.quantize.report import MatrixError
from cmx_jax.model.weights import all_leaves

Errors = dict[str, MatrixError]
"""Errors by path of the matrix."""


class Walk:
    """Hidden states of the calibration text at one position in the model.

    Attributes:
      number: Number of the next layer that the text goes through.
      x: Hidden states before that layer, `[B, T, D]`.
    """

    def __init__(
        self,
        reader: PieceReader,
        tokens: Int[np.ndarray, "B T"],
        parts: frozenset[str],
        int8: frozenset[tuple[str, str]],
    ):
        self.c, self.reader, self.tokens = reader.checkpoint.config, reader, tokens
        self.parts, self.int8 = parts, int8
        self.paths: dict[str, list[str]] = defaultdict(list)
        for leaf in all_leaves(self.c, self.c.n_routed_experts, reader.checkpoint.mtp):
            if leaf.kind != "slots" and not leaf.experts:
                self.paths[leaf.stack].append(leaf.path)
        self.number, self.x = 0, self._embed(tokens)

    def piece(self, stack: str, path: str, index: int, expert: int = 0) -> np.ndarray:
        """Reads a piece of a layer in float32."""
        return self.reader.piece((stack, path, index, expert), "float32")

    def _embed(self, tokens: np.ndarray) -> np.ndarray:
        return self.piece("", "embed", 0)[tokens]

    def stack(self, number: int) -> tuple[str, int]:
        """Stack of a layer, and the layer's number in it."""
        layers = self.c.num_hidden_layers
        if number >= layers:
            return "mtp", number - layers
        moe = self.c.layers[number].moe
        return ("moe" if moe else "dense"), sum(kind.moe == moe for kind in self.c.layers[:number])

    def pieces(self, number: int) -> tuple[Pieces, Experts]:
        """Pieces of a layer as they are stored, and a function that reads those of an expert."""
        stack, index = self.stack(number)

        def expert(e: int) -> Pieces:
            return {path: self.piece(stack, path, index, e) for path in (EXPERTS, DOWN)}

        return {path: self.piece(stack, path, index) for path in self.paths[stack]}, expert

    def calibrated(
        self, number: int, parts: frozenset[str], *, compare: bool = False
    ) -> tuple[Calibrated, Experts]:
        """The next layer, calibrated on the text; see `cmx_jax.model.quantize.layer.calibrated`."""
        stack = self.stack(number)[0]
        pieces, expert = self.pieces(number)
        x, joined = self._draft(pieces) if stack == "mtp" else (self.x, None)
        try:
            int8 = frozenset(path for field_stack, path in self.int8 if field_stack == stack)
            layer = calibrated(self.c, stack, number, pieces, x, expert, parts, int8, compare=compare)
        except CmxError:  # a ValueError too, which names its tensor already
            raise
        except ValueError as error:
            raise ValueError(f"layer {number}: {error}") from None
        if joined is not None:
            layer.seen.inputs["eh_proj"] = joined
        if joined is not None and compare:
            layer.before["eh_proj"] = round_piece("eh_proj", pieces["eh_proj"], joined).error
        return layer, expert

    def _draft(self, pieces: Pieces) -> tuple[np.ndarray, np.ndarray]:
        """Hidden states before an MTP layer, `[B, T, D]`, and inputs of its `eh_proj`, `[B T, 2 D]`."""
        c, next_tokens = self.c, np.roll(self.tokens, -1, axis=1)
        hidden = norm(jnp.asarray(self.x), jnp.asarray(self.piece("", "norm", 0)), c)
        halves = (
            norm(jnp.asarray(self._embed(next_tokens)), jnp.asarray(pieces["enorm"]), c),
            norm(hidden, jnp.asarray(pieces["hnorm"]), c),
        )
        joined = np.concatenate([np.asarray(half) for half in halves], axis=-1)
        return joined @ pieces["eh_proj"], joined.reshape(-1, joined.shape[-1])

    def _step(self, layer: Calibrated, routed: np.ndarray | None) -> None:
        """Moves the text past a layer. The result of an MTP layer is not computed, since nothing reads it."""
        self.x = self.x if layer.stack == "mtp" else layer.hidden(self.x, routed)
        self.number = layer.number + 1

    def advance(self, number: int) -> None:
        """Carries the text to a layer.

        Layers on the way are transformed but not rounded, so that a resumed run finds the same numbers, to
        the last bit, as one that was never killed.
        """
        while self.number < number:
            layer, expert = self.calibrated(self.number, self.parts)
            routed = None if layer.seen.tokens is None else np.zeros_like(layer.seen.tokens)
            for e in range(self.c.n_routed_experts if routed is not None else 0):
                rows, answers = layer.expert(e, expert(e))[2]
                routed[rows] += answers  # type: ignore[index]
            self._step(layer, routed)

    def tensors(self, number: int, unit: Unit) -> Generator[tuple[str, np.ndarray], None, Errors]:
        """Yields a layer's tensors, transformed, and rounded if the unit says so; returns their errors."""
        self.advance(number)
        layer, expert = self.calibrated(number, self.parts, compare=True)
        routed = None if layer.seen.tokens is None else np.zeros_like(layer.seen.tokens)
        errors: dict[str, list[MatrixError]] = defaultdict(list)

        @lru_cache(1)  # gate, up and down of an expert follow each other
        def transformed(e: int) -> tuple[Pieces, dict[str, np.ndarray]]:
            pieces, inputs, (rows, answers) = layer.expert(e, expert(e))
            assert routed is not None
            routed[rows] += answers
            return pieces, inputs

        @lru_cache(2)
        def rounded(path: str, e: int) -> Rounded:
            pieces, inputs = transformed(e) if path in (EXPERTS, DOWN) else (layer.pieces, layer.seen.inputs)
            piece = round_piece(path, pieces[path], inputs[path], self.parts)
            plain = layer.before.get(path, piece.plain)
            errors[path].append(MatrixError(plain, piece.error, piece.clipped))
            return piece

        for parts in unit.tensors:
            path, e = parts[0].piece[1], parts[0].piece[3]
            if not unit.quantized(parts[0]):
                sources = transformed(e)[0] if path in (EXPERTS, DOWN) else layer.pieces
                yield parts[0].name, _file_tensor(parts, sources).astype(unit.floats(parts[0]))
                continue
            piece = rounded(path, e)
            yield parts[0].name, _file_tensor(parts, {path: piece.q})
            spread = np.broadcast_to(piece.scale, piece.q.shape)
            yield (
                f"{parts[0].name}_scale",
                _file_tensor(parts, {path: spread})[:, :1].astype(ml_dtypes.bfloat16),
            )
        self._step(layer, routed)
        return {path: _mean(rows) for path, rows in errors.items()}


def _mean(errors: list[MatrixError]) -> MatrixError:
    """Mean over the experts' matrices of a path."""
    return MatrixError(
        plain=float(np.mean([e.plain for e in errors])),
        written=float(np.mean([e.written for e in errors])),
        clipped=float(np.mean([e.clipped for e in errors])),
    )


def _file_tensor(parts: list[Source], pieces: Pieces) -> np.ndarray:
    """A tensor of the file, assembled from the pieces that it holds."""
    out = np.empty(parts[0].shape, pieces[parts[0].piece[1]].dtype)
    for s in parts:
        s.view(out)[...] = pieces[s.piece[1]][s.part]
    return out
