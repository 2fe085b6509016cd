"""Effect of rounding one field alone on the model's answers, by which fields are chosen to stay in floats."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from cmx_jax.model.decoder import norm
from cmx_jax.model.quantize.fold import Pieces
from cmx_jax.model.quantize.layer import DOWN, EXPERTS, Experts, hidden_of, rounded_plainly
from cmx_jax.model.quantize.observe import Seen, layer_of, observe, outputs, rows_of
from cmx_jax.model.quantize.walk import Walk
from cmx_jax.model.weights import int8_fields
from cmx_jax.quant import QTensor
from cmx_jax.quant.int8_weights import rows_through_int8
from cmx_jax.quant.product_errors import checked

Hidden = dict[str, np.ndarray]
"""Hidden states with one field rounded in all layers so far, by that field (`stack/path`; "" is none)."""


def sensitivity(walk: Walk, progress: Callable[[str], None]) -> dict[str, float]:
    """Mean Kullback-Leibler divergence of the next token that rounding a field causes, in nats, by field.

    MTP layers are left out, since they do not change the model's answers. All variants go through the layers
    together, so that weights are read once.

    Args:
      walk: Calibration text before the first layer.
      progress: Callback for one line about the current action.

    Raises:
      ValueError: A hidden state is not finite.
    """
    c = walk.c
    fields = ["/".join(field) for field in sorted(int8_fields(c, mtp=False))]
    hidden: Hidden = dict.fromkeys(["", *fields], walk.x)
    for number in range(c.num_hidden_layers):
        progress(f"measuring layer {number} ({number + 1} of {c.num_hidden_layers})")
        _pass_layer(walk, number, hidden)
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


def _pass_layer(walk: Walk, number: int, hidden: Hidden) -> None:
    """Carries all variants through a layer."""
    (pieces, expert), stack, kind = walk.pieces(number), walk.stack(number)[0], walk.c.layers[number]
    served = {field: layer_of(walk.c, stack, _served(stack, pieces, field)) for field in hidden}
    routed: Hidden = {}
    if kind.moe:
        seen = {f: observe(walk.c, kind, number, w, hidden[f], inputs=False) for f, w in served.items()}
        routed = _routed(stack, seen, expert, walk.c.n_routed_experts)
        seen.clear()
    for field, w in served.items():
        hidden[field] = outputs(walk.c, kind, number, w, hidden[field], routed.pop(field, None))
    checked(f"layer {number}: hidden states", hidden[""].reshape(-1, walk.c.hidden_size))


def _served(stack: str, pieces: Pieces, field: str) -> Pieces:
    """A layer's pieces with one field rounded as in serving."""
    field_stack, _, path = field.partition("/")
    if field_stack != stack or path not in pieces:
        return pieces
    rounded: Any = QTensor(*map(jnp.asarray, rounded_plainly(path, pieces[path])))
    return pieces | {path: rounded}


def _routed(stack: str, variants: dict[str, Seen], expert: Experts, experts: int) -> Hidden:
    """Weighted sums of the experts' outputs, by variant."""
    routed = {field: np.zeros_like(seen.tokens) for field, seen in variants.items()}
    for e in range(experts):
        pieces = expert(e)
        served = {}
        for path in (EXPERTS, DOWN):
            q, scale = rounded_plainly(path, pieces[path])
            served[f"{stack}/{path}"] = path, q * scale
        for field, seen in variants.items():
            rows, weights = rows_of(seen, e)
            path, w = served.get(field, ("", None))
            x = seen.tokens[rows]
            h = hidden_of(rows_through_int8(x), w) if path == EXPERTS else hidden_of(x, pieces[EXPERTS])
            y = rows_through_int8(h) @ w if path == DOWN else h @ pieces[DOWN]
            routed[field][rows] += weights[:, None] * y
    return routed


def _divergence(exact: np.ndarray, rounded: np.ndarray) -> float:
    """Mean Kullback-Leibler divergence of log probabilities, at least 0, in nats.

    In float32 the sum may be slightly negative where both are nearly equal. NaN stays NaN.
    """
    return float(np.maximum(np.mean(np.sum(np.exp(exact) * (exact - rounded), axis=-1)), 0))
