"""Calibration text on its way through a model's layers, one layer in memory at a time."""

from collections import defaultdict
from collections.abc import Generator
from functools import lru_cache

import jax.numpy as jnp
import ml_dtypes
import numpy as np
from jaxtyping import Int

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
from cmx_jax.model.weights import all_leaves

Errors = dict[str, dict[str, float]]
"""By matrix (of experts the mean) the relative error of its products by `plain` rounding and as `written`,
and the share of its output channels that are `clipped`."""


class Walk:
    """Hidden states of the calibration text, `x [B, T, D]`, before layer `number`."""

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
        return self.reader.piece((stack, path, index, expert), "float32")

    def _embed(self, tokens: np.ndarray) -> np.ndarray:
        return self.piece("", "embed", 0)[tokens]

    def stack(self, number: int) -> tuple[str, int]:
        """Stack of a layer, and its number there."""
        layers = self.c.num_hidden_layers
        if number >= layers:
            return "mtp", number - layers
        moe = self.c.layers[number].moe
        return ("moe" if moe else "dense"), sum(kind.moe == moe for kind in self.c.layers[:number])

    def pieces(self, number: int) -> tuple[Pieces, Experts]:
        """A layer as it is stored."""
        stack, index = self.stack(number)

        def expert(e: int) -> Pieces:
            return {path: self.piece(stack, path, index, e) for path in (EXPERTS, DOWN)}

        return {path: self.piece(stack, path, index) for path in self.paths[stack]}, expert

    def calibrated(
        self, number: int, parts: frozenset[str], *, compare: bool = False
    ) -> tuple[Calibrated, Experts]:
        """A layer before which the text stands; see `cmx_jax.model.quantize.layer.calibrated`."""
        stack = self.stack(number)[0]
        pieces, expert = self.pieces(number)
        x, joined = self._draft(pieces) if stack == "mtp" else (self.x, None)
        try:
            int8 = frozenset(path for of, path in self.int8 if of == stack)
            layer = calibrated(self.c, stack, number, pieces, x, expert, parts, int8, compare=compare)
        except ValueError as error:
            raise ValueError(f"layer {number}: {error}") from None
        if joined is not None:
            layer.seen.inputs["eh_proj"] = joined
        if joined is not None and compare:
            layer.before["eh_proj"] = round_piece("eh_proj", pieces["eh_proj"], joined).error
        return layer, expert

    def _draft(self, pieces: Pieces) -> tuple[np.ndarray, np.ndarray]:
        """What an MTP layer starts from, and what its `eh_proj` is given."""
        c, behind = self.c, np.roll(self.tokens, -1, axis=1)
        hidden = norm(jnp.asarray(self.x), jnp.asarray(self.piece("", "norm", 0)), c)
        halves = (
            norm(jnp.asarray(self._embed(behind)), jnp.asarray(pieces["enorm"]), c),
            norm(hidden, jnp.asarray(pieces["hnorm"]), c),
        )
        joined = np.concatenate([np.asarray(half) for half in halves], axis=-1)
        return joined @ pieces["eh_proj"], joined.reshape(-1, joined.shape[-1])

    def _behind(self, layer: Calibrated, routed: np.ndarray | None) -> None:
        """The text is behind a layer now; an MTP layer's result is nobody's input."""
        self.x = self.x if layer.stack == "mtp" else layer.hidden(self.x, routed)
        self.number = layer.number + 1

    def advance(self, number: int) -> None:
        """Carries the text to a layer, nothing being rounded on the way, but all transformed: what goes on
        behind a kill finds the same numbers, to the last bit, as what was never killed."""
        while self.number < number:
            layer, expert = self.calibrated(self.number, self.parts)
            routed = None if layer.seen.tokens is None else np.zeros_like(layer.seen.tokens)
            for e in range(self.c.n_routed_experts if routed is not None else 0):
                rows, answers = layer.expert(e, expert(e))[2]
                routed[rows] += answers  # type: ignore[index]
            self._behind(layer, routed)

    def tensors(self, number: int, unit: Unit) -> Generator[tuple[str, np.ndarray], None, Errors]:
        """The tensors of a layer, transformed, rounded where the unit says so; returns their errors."""
        self.advance(number)
        layer, expert = self.calibrated(number, self.parts, compare=True)
        routed = None if layer.seen.tokens is None else np.zeros_like(layer.seen.tokens)
        found: dict[str, list[dict[str, float]]] = defaultdict(list)

        @lru_cache(1)  # gate, up and down of an expert come one behind the other
        def of_expert(e: int) -> tuple[Pieces, dict[str, np.ndarray]]:
            pieces, inputs, (rows, answers) = layer.expert(e, expert(e))
            assert routed is not None
            routed[rows] += answers
            return pieces, inputs

        @lru_cache(2)
        def rounded(path: str, e: int) -> Rounded:
            pieces, inputs = of_expert(e) if path in (EXPERTS, DOWN) else (layer.pieces, layer.seen.inputs)
            piece = round_piece(path, pieces[path], inputs[path], self.parts)
            errors = {"plain": piece.plain, "written": piece.error, "clipped": piece.clipped}
            found[path].append(errors | {"plain": layer.before.get(path, piece.plain)})
            return piece

        for parts in unit.tensors:
            path, e = parts[0].piece[1], parts[0].piece[3]
            if not unit.quantized(parts[0]):
                sources = of_expert(e)[0] if path in (EXPERTS, DOWN) else layer.pieces
                yield parts[0].name, _file(parts, sources).astype(unit.floats(parts[0]))
                continue
            piece = rounded(path, e)
            yield parts[0].name, _file(parts, {path: piece.q})
            spread = np.broadcast_to(piece.scale, piece.q.shape)
            yield f"{parts[0].name}_scale", _file(parts, {path: spread})[:, :1].astype(ml_dtypes.bfloat16)
        self._behind(layer, routed)
        return {
            path: {name: float(np.mean([x[name] for x in of])) for name in of[0]}
            for path, of in found.items()
        }


def _file(parts: list[Source], pieces: Pieces) -> np.ndarray:
    """Pieces as the file has them."""
    out = np.empty(parts[0].shape, pieces[parts[0].piece[1]].dtype)
    for s in parts:
        s.view(out)[...] = pieces[s.piece[1]][s.part]
    return out
