"""One layer on calibration text: what its matrices are given, and what it makes of the hidden states."""

from dataclasses import dataclass, field, fields, is_dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int

from cmx_jax.mesh.exchange import ExchangeStats
from cmx_jax.model.attention import Where, local
from cmx_jax.model.config import LayerKind, ModelConfig
from cmx_jax.model.decoder import Stream, layer
from cmx_jax.model.quantize.fold import Pieces
from cmx_jax.model.weights import Experts, Layer, Leaf, int8_fields, weight_tree
from cmx_jax.quant import QTensor
from cmx_jax.quant.matmul import Observed


@dataclass
class Seen:
    """What a layer was given, `T` being all calibration tokens.

    Attributes:
      inputs: of each matrix but the experts', `[T, I]`.
      tokens: `[T, D]` for the experts; with weighed inputs a row for each expert that a token chose.
      chosen: their experts `[T, K]`, and their weights.
    """

    inputs: dict[str, np.ndarray] = field(default_factory=dict)
    tokens: Any = None
    chosen: Any = None
    weights: Any = None


def layer_of(c: ModelConfig, stack: str, pieces: Pieces) -> Layer:
    """Pieces of one layer as the decoder takes them, without experts."""

    def make(leaf: Leaf) -> Any:
        if leaf.kind == "slots":
            return np.zeros(leaf.piece_shape, np.int32)
        return None if leaf.stack != stack or leaf.experts else pieces.get(leaf.path)

    found = getattr(weight_tree(c, c.n_routed_experts, make), stack)
    return found.layer if stack == "mtp" else found


def _observed(tree: Any, wanted: frozenset[str], seen: dict[str, Any], path: str) -> Any:
    """The same weights, whose products note what they are given."""
    if is_dataclass(tree) and not isinstance(tree, QTensor):
        inner = {f.name: getattr(tree, f.name) for f in fields(tree)}
        marked = {name: _observed(x, wanted, seen, f"{path}.{name}") for name, x in inner.items()}
        return tree.replace(**marked)  # type: ignore[union-attr]
    return Observed(tree, path, seen) if path in wanted and isinstance(tree, jax.Array) else tree


@partial(jax.jit, static_argnames=("c", "kind"))
def _run(
    w: Layer, x: Any, routed: Any, number: Any, *, c: ModelConfig, kind: LayerKind
) -> tuple[Any, dict[str, Any], dict[str, Any]]:
    """The layer on one sequence `[1, T, D]`, experts having answered `routed`."""
    inputs: dict[str, Any] = {}
    given: dict[str, Any] = {}

    def run(tokens: Any, chosen: Any, weights: Any, *_: Any) -> tuple[Any, ExchangeStats]:
        given.update(tokens=tokens, chosen=chosen, weights=weights)
        zero = jnp.zeros((), jnp.int32)
        return jnp.zeros_like(tokens) if routed is None else routed, ExchangeStats(zero, zero, zero)

    length = x.shape[1]
    positions = jnp.arange(length, dtype=jnp.int32)[None]
    stream = Stream(None, jnp.ones((1, length), bool), local(Where(positions), length, c))
    wanted = frozenset(path for _, path in int8_fields(c))
    marked = w.replace(
        attn=_observed(w.attn, wanted, inputs, "attn"), ffn=_observed(w.ffn, wanted, inputs, "ffn")
    )
    zero = jnp.zeros((), jnp.int32)
    [done] = layer([x], [stream], marked, kind, Experts(None, None), number, zero, c, run)
    return done.hidden, inputs, given


def observe(c: ModelConfig, kind: LayerKind, number: int, w: Layer, x: Float[np.ndarray, "B T D"]) -> Seen:
    """What each matrix of a layer is given by hidden states `x`."""
    found = [_run(w, one[None], None, np.int32(number), c=c, kind=kind)[1:] for one in x]

    def joined(parts: list[Any]) -> np.ndarray:
        return np.concatenate([np.asarray(part).reshape(-1, part.shape[-1]) for part in parts])

    inputs = {path: joined([inputs[path] for inputs, _ in found]) for path in found[0][0]}
    given = {name: joined([given[name] for _, given in found]) for name in found[0][1]}
    return Seen(inputs, **given)


def outputs(
    c: ModelConfig,
    kind: LayerKind,
    number: int,
    w: Layer,
    x: Float[np.ndarray, "B T D"],
    routed: Float[np.ndarray, "N D"] | None,
) -> Float[np.ndarray, "B T D"]:
    """The hidden states behind the layer, its experts having answered `routed` (rows as `Seen.tokens`)."""
    parts: Any = [None] * len(x) if routed is None else np.split(routed, len(x))
    each = [
        _run(w, one[None], part, np.int32(number), c=c, kind=kind)[0]
        for one, part in zip(x, parts, strict=True)
    ]
    return np.concatenate([np.asarray(h) for h in each])


def rows_of(seen: Seen, expert: int) -> tuple[Int[np.ndarray, " N"], Float[np.ndarray, " N"]]:
    """The rows of `Seen.tokens` that chose an expert, and what its answer to each counts for."""
    row, turn = np.nonzero(seen.chosen == expert)
    return row, seen.weights[row, turn]
