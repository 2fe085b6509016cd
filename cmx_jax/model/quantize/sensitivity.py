"""What rounding one field alone does to the model's answers: the measure by which fields stay in floats."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from cmx_jax.model.decoder import norm
from cmx_jax.model.quantize.fold import Pieces
from cmx_jax.model.quantize.layer import DOWN, EXPERTS, Calibrated, hidden_of, round_piece
from cmx_jax.model.quantize.observe import layer_of, observe, outputs, rows_of
from cmx_jax.model.quantize.walk import Walk
from cmx_jax.model.weights import Layer, int8_fields
from cmx_jax.quant import QTensor
from cmx_jax.quant.weights import rows_through_int8

Hidden = dict[str, np.ndarray]
"""By field (`stack/path`; "" is none) the hidden states with that field rounded in all layers so far."""


def sensitivity(walk: Walk, progress: Callable[[str], None]) -> dict[str, float]:
    """By field the Kullback-Leibler divergence of the next token (nats, mean) that rounding it causes.

    MTP layers have no say in the model's answers, and are left out.
    All variants go through the layers together, so that weights are read once.
    """
    c = walk.c
    fields = ["/".join(field) for field in sorted(int8_fields(c, mtp=False))]
    hidden: Hidden = dict.fromkeys(["", *fields], walk.x)
    for number in range(c.num_hidden_layers):
        progress(f"measuring layer {number} ({number + 1} of {c.num_hidden_layers})")
        walk.x = hidden[""]
        layer, expert = walk.calibrated(number, frozenset())
        served = {field: layer_of(c, layer.stack, _served(layer, field)) for field in hidden}
        routed = _routed(layer, hidden, served, expert) if layer.kind.moe else {}
        for field, w in served.items():
            hidden[field] = outputs(c, layer.kind, number, w, hidden[field], routed.get(field))
    head = walk.piece("", "embed", 0).T if c.tie_word_embeddings else walk.piece("", "head", 0)
    weight, costs = walk.piece("", "norm", 0), dict.fromkeys(fields, 0.0)

    def log_probabilities(field: str, i: int) -> np.ndarray:
        states = np.asarray(norm(jnp.asarray(hidden[field][i]), jnp.asarray(weight), c))
        return np.asarray(jax.nn.log_softmax(states @ head, axis=-1))

    for i in range(len(walk.x)):  # a sequence at a time: a vocabulary is wide
        exact = log_probabilities("", i)
        for field in fields:
            costs[field] += _divergence(exact, log_probabilities(field, i)) / len(walk.x)
    return costs


def _served(layer: Calibrated, field: str) -> Pieces:
    """A layer's pieces with one field as it would be served."""
    stack, _, path = field.partition("/")
    if stack != layer.stack or path not in layer.pieces:
        return layer.pieces
    r = round_piece(path, layer.pieces[path], layer.seen.inputs[path][:1])
    rounded: Any = QTensor(jnp.asarray(r.q), jnp.asarray(r.scale))
    return layer.pieces | {path: rounded}


def _routed(
    layer: Calibrated, hidden: Hidden, weights_of: dict[str, Layer], expert: Callable[[int], Pieces]
) -> Hidden:
    """Of each variant the experts' answers."""
    c, each = layer.c, {}
    for field, x in hidden.items():
        each[field] = observe(c, layer.kind, layer.number, weights_of[field], x)
        each[field].inputs.clear()  # those of all variants would be the most memory that this takes
    routed = {field: np.zeros_like(seen.tokens) for field, seen in each.items()}
    for e in range(c.n_routed_experts):
        pieces = expert(e)
        served = {}
        for path in (EXPERTS, DOWN):
            r = round_piece(path, pieces[path], np.zeros((1, pieces[path].shape[0]), np.float32))
            served[f"{layer.stack}/{path}"] = path, r.q * r.scale
        for field, seen in each.items():
            rows, weights = rows_of(seen, e)
            path, w = served.get(field, ("", None))
            x = seen.tokens[rows]
            h = hidden_of(rows_through_int8(x), w) if path == EXPERTS else hidden_of(x, pieces[EXPERTS])
            y = rows_through_int8(h) @ w if path == DOWN else h @ pieces[DOWN]
            routed[field][rows] += weights[:, None] * y
    return routed


def _divergence(exact: np.ndarray, found: np.ndarray) -> float:
    """At least 0, which float32 may miss where both are nearly equal; NaN stays NaN."""
    return float(np.maximum(np.mean(np.sum(np.exp(exact) * (exact - found), axis=-1)), 0))
