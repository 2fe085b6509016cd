"""Quantises one layer to INT8: transforms its matrices for rounding and rounds them, by calibration data."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float

from cmx_jax.model.config import LayerKind, ModelConfig
from cmx_jax.model.quantize.fold import (
    Link,
    Pieces,
    input_axes,
    links,
    matrix,
    rotate,
    scale_readers,
    scale_writer,
)
from cmx_jax.model.quantize.observe import Seen, layer_of, observe, outputs, rows_of
from cmx_jax.quant.clip import search_clip
from cmx_jax.quant.compensate import compensate
from cmx_jax.quant.int8_weights import channel_scale, quantize, rows_through_int8
from cmx_jax.quant.product_errors import checked, gram, relative
from cmx_jax.quant.scale_search import search_scales

PARTS = ("precision", "scales", "rotation", "clipping", "compensation")
"""Parts of section 4.5 that are applied before serving; the INT8 matmul is in `cmx_jax.quant.matmul`."""
EXPERTS, DOWN = "ffn.experts.gate_up", "ffn.experts.down"
MIN_ROWS = 64  # with fewer rows calibration tells less about an expert than its weights alone
SAMPLED_EXPERTS = 8  # busiest experts, by which the scales shared by all experts are chosen

Experts = Callable[[int], Pieces]
"""Function from the number of an expert to its pieces."""


class Rounded(NamedTuple):
    """A piece in INT8.

    Attributes:
      q: INT8 numbers.
      scale: Scales, with axes of length 1 along inputs.
      plain: Relative error of the piece's products in W8A8 by rounding alone.
      error: Relative error of the piece's products in W8A8 as it is.
      clipped: Share of output channels that are clipped.
    """

    q: np.ndarray
    scale: np.ndarray
    plain: float
    error: float
    clipped: float


@dataclass
class Calibrated:
    """A layer whose pieces are ready to be rounded.

    Attributes:
      c: Config of the model.
      kind: Kind of layer.
      number: Number of the layer in the model.
      stack: Stack that the layer belongs to.
      pieces: Transformed pieces by path, without experts.
      seen: Inputs of the pieces, transformed too.
      parts: Parts to apply, from `PARTS`.
      int8: Paths of pieces that become INT8.
      before: Error of rounding alone before any transformation, by path.
      shared_scale: Scale that the experts' inputs were divided by; None if they were not.
    """

    c: ModelConfig
    kind: LayerKind
    number: int
    stack: str
    pieces: Pieces
    seen: Seen
    parts: frozenset[str]
    int8: frozenset[str]
    before: dict[str, float] = field(default_factory=dict)
    shared_scale: Any = None

    def expert(self, e: int, raw: Pieces) -> tuple[Pieces, dict[str, np.ndarray], Any]:
        """An expert's pieces, transformed.

        Args:
          e: Number of the expert.
          raw: Pieces of the expert as they are stored.

        Returns:
          The pieces, their inputs by path, and the expert's output as `(rows, weighted output [N, D])`.
        """
        pieces = dict(raw)
        if self.shared_scale is not None:
            scale_readers(pieces, (EXPERTS,), self.shared_scale)
        rows, weights = rows_of(self.seen, e)
        x = self.seen.tokens[rows]
        h = hidden_of(x, pieces[EXPERTS])
        if "scales" in self.parts and DOWN in self.int8 and len(rows) >= MIN_ROWS:
            s = search_scales(h, [pieces[DOWN]]).s
            scale_readers(pieces, (DOWN,), s)
            scale_writer(pieces, EXPERTS, s)
            h = h / s
        return pieces, {EXPERTS: x, DOWN: h}, (rows, weights[:, None] * (h @ pieces[DOWN]))

    def hidden(
        self, x: Float[np.ndarray, "B T D"], routed: Float[np.ndarray, "N D"] | None
    ) -> Float[np.ndarray, "B T D"]:
        """Hidden states after the layer; see `cmx_jax.model.quantize.observe.outputs`."""
        w = layer_of(self.c, self.stack, self.pieces)
        return outputs(self.c, self.kind, self.number, w, x, routed)


def hidden_of(x: np.ndarray, gate_up: np.ndarray) -> np.ndarray:
    """Hidden activations `silu(gate) * up` of rows."""
    gate, up = x @ gate_up[:, 0], x @ gate_up[:, 1]
    return gate / (1 + np.exp(-np.clip(gate, -80, 80))) * up


def calibrated(
    c: ModelConfig,
    stack: str,
    number: int,
    pieces: Pieces,
    x: Float[np.ndarray, "B T D"],
    experts: Experts,
    parts: frozenset[str],
    int8: frozenset[str],
    *,
    compare: bool = False,
) -> Calibrated:
    """Observes a layer on hidden states, and transforms it without changing its output.

    Args:
      c: Config of the model.
      stack: Stack that the layer belongs to.
      number: Number of the layer in the model.
      pieces: Pieces by path, without experts; transformed in place.
      x: Hidden states before the layer.
      experts: Function that reads the pieces of an expert.
      parts: Parts to apply, from `PARTS`.
      int8: Paths of pieces that become INT8.
      compare: True to measure `Calibrated.before`.

    Raises:
      ValueError: A number is not finite.
    """
    kind = LayerKind(moe=True) if stack == "mtp" else c.layers[number]

    def observed() -> Seen:
        return observe(c, kind, number, layer_of(c, stack, pieces), x)

    before = {}
    if compare:
        before = {path: round_piece(path, pieces[path], x).error for path, x in observed().inputs.items()}
    if "rotation" in parts:
        rotate(c, pieces, int8)
    layer = Calibrated(c, kind, number, stack, pieces, observed(), parts, int8, before)
    if "scales" in parts:
        for link in links(c, pieces):
            if int8 & {*link.readers, *((EXPERTS,) if link.floats else ())}:
                _scale(layer, link, experts)
    return layer


def _scale(layer: Calibrated, link: Link, experts: Experts) -> None:
    """Searches the scales of a link's inputs, and moves them from writer to readers."""
    seen, pieces = layer.seen, layer.pieces
    readers = [path for path in link.readers if path in seen.inputs]
    x = seen.inputs[readers[0]] if readers else seen.tokens
    maps = [matrix(path, pieces[path]) for path in readers if path in layer.int8]
    routed = "ffn.router" in link.floats  # the router has the experts' inputs
    if routed and EXPERTS in layer.int8:
        counts = np.bincount(seen.chosen[seen.chosen >= 0].reshape(-1), minlength=layer.c.n_routed_experts)
        busiest = np.argsort(-counts, kind="stable")[:SAMPLED_EXPERTS]
        maps += [matrix(EXPERTS, experts(int(e))[EXPERTS]) for e in busiest]
    s = search_scales(x, maps).s
    scale_readers(pieces, (*readers, *link.floats), s)
    scale_writer(pieces, link.writer, s)
    seen.inputs.update(dict.fromkeys(readers, x / s))  # they share their inputs
    if routed:
        seen.tokens, layer.shared_scale = seen.tokens / s, s


def round_piece(
    path: str, piece: np.ndarray, x: Float[np.ndarray, "T I"], parts: frozenset[str] = frozenset()
) -> Rounded:
    """Rounds a matrix to INT8.

    Args:
      path: Path of the piece.
      piece: Weights.
      x: Inputs of the matrix.
      parts: Parts to apply; of `PARTS`, only clipping and compensation matter here.

    Raises:
      ValueError: A number is not finite.
    """
    w, x = matrix(path, piece), checked(path, x)
    scale = channel_scale(w)
    q = quantize(w, scale[None])
    plain, clipped = _error(x, w, q, scale), 0.0
    error = plain
    if len(x) >= MIN_ROWS and parts & {"clipping", "compensation"}:
        best = search_clip(x, w).scale if "clipping" in parts else scale
        candidate = quantize(w, best[None])
        if "compensation" in parts and len(x) >= len(w):  # fewer rows tell nothing about most directions
            candidate = compensate(gram(x[::2]), w, best, judge=gram(x[1::2]))
        error = _error(x, w, candidate, best)
        if error < plain:
            q, scale, clipped = candidate, best, float(np.mean(best < scale))
        error = min(error, plain)
    return Rounded(q.reshape(piece.shape), _as_piece(path, piece, scale), plain, error, clipped)


def rounded_plainly(path: str, piece: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Rounds a matrix to INT8 without calibration; returns numbers and scales as in `Rounded`."""
    w = matrix(path, piece)
    scale = channel_scale(w)
    return quantize(w, scale[None]).reshape(piece.shape), _as_piece(path, piece, scale)


def _as_piece(path: str, piece: np.ndarray, scale: np.ndarray) -> np.ndarray:
    inputs = input_axes(path)
    return scale.reshape((1,) * inputs + piece.shape[inputs:])


def _error(x: np.ndarray, w: np.ndarray, q: np.ndarray, scale: np.ndarray) -> float:
    """Relative error of the products in W8A8."""
    exact = x @ w
    off = rows_through_int8(x) @ (q * scale[None]).astype(np.float32) - exact
    return relative(float(np.square(off, dtype=np.float64).sum()), float(np.square(exact).sum()))
