"""One layer on calibration text: what its matrices are given, and what it makes of the hidden states."""

from collections import defaultdict
from dataclasses import dataclass, field, fields, is_dataclass
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


@partial(jax.jit, static_argnames=("c", "kind", "noted"))
def _run(
    w: Layer, x: Any, routed: Any, number: Any, *, c: ModelConfig, kind: LayerKind, noted: bool
) -> tuple[Any, dict[str, Any], dict[str, Any]]:
    """The layer on one sequence `[1, T, D]`, experts having answered `routed`; inputs only if `noted`."""
    inputs: dict[str, Any] = {}
    given: dict[str, Any] = {}

    def run(tokens: Any, chosen: Any, weights: Any, *_: Any) -> tuple[Any, ExchangeStats]:
        given.update(tokens=tokens, chosen=chosen, weights=weights)
        zero = jnp.zeros((), jnp.int32)
        return jnp.zeros_like(tokens) if routed is None else routed, ExchangeStats(zero, zero, zero)

    length = x.shape[1]
    positions = jnp.arange(length, dtype=jnp.int32)[None]
    attend = data_parallel_attention(TokenPositions(positions), length, c)
    stream = Stream(None, jnp.ones((1, length), bool), attend)
    wanted = frozenset(path for _, path in int8_fields(c)) if noted else frozenset()
    marked = w.replace(
        attn=_observed(w.attn, wanted, inputs, "attn"), ffn=_observed(w.ffn, wanted, inputs, "ffn")
    )
    zero = jnp.zeros((), jnp.int32)
    [done] = layer([x], [stream], marked, kind, Experts(None, None), number, zero, c, run)
    return done.hidden, inputs, given


def observe(
    c: ModelConfig,
    kind: LayerKind,
    number: int,
    w: Layer,
    x: Float[np.ndarray, "B T D"],
    *,
    inputs: bool = True,
) -> Seen:
    """What each matrix of a layer is given by hidden states `x`; without `inputs` only what experts are."""
    each, on_device = defaultdict[str, list[Any]](list), jax.device_put(w)
    for one in x:
        _, noted, given = _run(on_device, one[None], None, np.int32(number), c=c, kind=kind, noted=inputs)
        for name, part in {**noted, **given}.items():
            each[name].append(np.asarray(part).reshape(-1, part.shape[-1]))
    del on_device
    joined = {name: np.concatenate(each.pop(name)) for name in list(each)}
    return Seen(**{name: joined.pop(name) for name in given}, inputs=joined)


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
    each, w = np.empty_like(x), jax.device_put(w)  # once: each call would copy what it is given
    for i, part in enumerate(parts):
        each[i] = _run(w, x[i][None], part, np.int32(number), c=c, kind=kind, noted=False)[0][0]
    return each


def rows_of(seen: Seen, expert: int) -> tuple[Int[np.ndarray, " N"], Float[np.ndarray, " N"]]:
    """The rows of `Seen.tokens` that chose an expert, and what its answer to each counts for."""
    row, turn = np.nonzero(seen.chosen == expert)
    return row, seen.weights[row, turn]
