"""Runs one layer on calibration text and records the inputs of its matrices and its output."""

from collections import defaultdict
from dataclasses import dataclass, field, fields, is_dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int

from cmx_jax.mesh.exchange import ExchangeStats
from cmx_jax.model.attention import TokenPositions, data_parallel_attention
from cmx_jax.model.config import LayerKind, ModelConfig
from cmx_jax.model.decoder import Stream, layer
from cmx_jax.model.leaf import Leaf
from cmx_jax.model.quantize.fold import Pieces
from cmx_jax.model.weights import Experts, Layer, int8_fields, weight_tree
from cmx_jax.quant import QTensor
from cmx_jax.quant.matmul import Observed


@dataclass
class Seen:
    """Inputs of a layer's matrices; `T` is the number of all calibration tokens.

    Attributes:
      inputs: Inputs by path of the matrix, `[T, I]`, without experts' matrices.
      tokens: Inputs of the experts, `[T, D]`; with weighed inputs one row for each expert that a token chose.
      chosen: Experts that each row of `tokens` chose, `[T, K]`.
      weights: Weights of the chosen experts, `[T, K]`.
    """

    inputs: dict[str, np.ndarray] = field(default_factory=dict)
    tokens: Any = None
    chosen: Any = None
    weights: Any = None


def layer_of(c: ModelConfig, stack: str, pieces: Pieces) -> Layer:
    """Pieces of one layer as the decoder's `Layer`, without experts."""

    def make(leaf: Leaf) -> Any:
        if leaf.kind == "slots":
            return np.zeros(leaf.piece_shape, np.int32)
        return None if leaf.stack != stack or leaf.experts else pieces.get(leaf.path)

    weights = getattr(weight_tree(c, c.n_routed_experts, make), stack)
    return weights.layer if stack == "mtp" else weights


Arrays = dict[str, jax.Array]
"""Arrays by name, traced ones inside `jax.jit`."""


def _observed(tree: Any, paths: frozenset[str], seen: Arrays, path: str) -> Any:
    """The same weights; products with those at `paths` record their inputs in `seen`."""
    if is_dataclass(tree) and not isinstance(tree, QTensor):
        inner = {f.name: getattr(tree, f.name) for f in fields(tree)}
        marked = {name: _observed(x, paths, seen, f"{path}.{name}") for name, x in inner.items()}
        return tree.replace(**marked)  # type: ignore[union-attr]
    return Observed(tree, path, seen) if path in paths and isinstance(tree, jax.Array) else tree


@partial(jax.jit, static_argnames=("c", "kind", "noted"))
def _run(
    w: Layer, x: Any, routed: Any, number: Any, *, c: ModelConfig, kind: LayerKind, noted: bool
) -> tuple[Any, Arrays, Arrays]:
    """Runs the layer on one sequence.

    Args:
      w: Weights of the layer.
      x: Hidden states before the layer, `[1, T, D]`.
      routed: Output of the experts; None means zeros.
      number: Number of the layer.
      c: Config of the model.
      kind: Kind of layer.
      noted: True to record the inputs of matrices.

    Returns:
      Hidden states after the layer, inputs of its matrices by path, and fields of `Seen` about its experts.
    """
    inputs: Arrays = {}
    routing: Arrays = {}

    def run(tokens: Any, chosen: Any, weights: Any, *_: Any) -> tuple[Any, ExchangeStats]:
        routing.update(tokens=tokens, chosen=chosen, weights=weights)
        zero = jnp.zeros((), jnp.int32)
        return jnp.zeros_like(tokens) if routed is None else routed, ExchangeStats(zero, zero, zero)

    length = x.shape[1]
    positions = jnp.arange(length, dtype=jnp.int32)[None]
    attend = data_parallel_attention(TokenPositions(positions), length, c)
    stream = Stream(None, jnp.ones((1, length), bool), attend)
    paths = frozenset(path for _, path in int8_fields(c)) if noted else frozenset()
    marked = replace(
        w, attn=_observed(w.attn, paths, inputs, "attn"), ffn=_observed(w.ffn, paths, inputs, "ffn")
    )
    zero = jnp.zeros((), jnp.int32)
    [done] = layer([x], [stream], marked, kind, Experts(None, None), number, zero, c, run)
    return done.hidden, inputs, routing


def observe(
    c: ModelConfig,
    kind: LayerKind,
    number: int,
    w: Layer,
    x: Float[np.ndarray, "B T D"],
    *,
    inputs: bool = True,
) -> Seen:
    """Inputs of a layer's matrices for hidden states `x` before it; only those of experts if not `inputs`."""
    parts, on_device = defaultdict[str, list[Any]](list), jax.device_put(w)
    for sequence in x:
        _, noted, routing = _run(
            on_device, sequence[None], None, np.int32(number), c=c, kind=kind, noted=inputs
        )
        for name, part in {**noted, **routing}.items():
            parts[name].append(np.asarray(part).reshape(-1, part.shape[-1]))
    del on_device
    joined = {name: np.concatenate(parts.pop(name)) for name in list(parts)}
    return Seen(**{name: joined.pop(name) for name in routing}, inputs=joined)


def outputs(
    c: ModelConfig,
    kind: LayerKind,
    number: int,
    w: Layer,
    x: Float[np.ndarray, "B T D"],
    routed: Float[np.ndarray, "N D"] | None,
) -> Float[np.ndarray, "B T D"]:
    """Hidden states after the layer, given its experts' output `routed` (rows as in `Seen.tokens`)."""
    parts: Any = [None] * len(x) if routed is None else np.split(routed, len(x))
    out, w = np.empty_like(x), jax.device_put(w)  # once: each call would copy its arguments
    for i, part in enumerate(parts):
        out[i] = _run(w, x[i][None], part, np.int32(number), c=c, kind=kind, noted=False)[0][0]
    return out


def rows_of(seen: Seen, expert: int) -> tuple[Int[np.ndarray, " N"], Float[np.ndarray, " N"]]:
    """Rows of `Seen.tokens` that chose an expert, and the weight of its output in each."""
    row, turn = np.nonzero(seen.chosen == expert)
    return row, seen.weights[row, turn]
