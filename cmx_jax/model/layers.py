"""Small parts that layers share: norms, masks and softmax of attention, SwiGLU of one expert and of many."""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.custom_batching import custom_vmap
from jaxtyping import Array, Bool, Float, Int, Shaped

from cmx_jax.mesh.exchange import Wire
from cmx_jax.mesh.exchange.ordering import bincount, stable_argsort
from cmx_jax.model.weights import FFN, Experts, Tensor
from cmx_jax.quant import einsum


def rms_norm(x: Float[Array, "*B D"], weight: Float[Array, " D"], eps: float) -> Float[Array, "*B D"]:
    """`weight * x / sqrt(mean(x^2) + eps)`, the mean in float32."""
    wide = x.astype(jnp.float32)
    scale = jax.lax.rsqrt(jnp.mean(jnp.square(wide), axis=-1, keepdims=True) + eps)
    weight = weight.reshape((1,) * (x.ndim - 1) + weight.shape)
    return weight * (wide * scale).astype(x.dtype)


def layer_norm(x: Float[Array, "*B D"], weight: Float[Array, " D"], eps: float) -> Float[Array, "*B D"]:
    """LayerNorm without bias: `weight * (x - mean) / sqrt(variance + eps)`, in float32."""
    wide = x.astype(jnp.float32)
    return rms_norm((wide - jnp.mean(wide, axis=-1, keepdims=True)).astype(x.dtype), weight, eps)


def add_bias(x: Array, bias: Array | None) -> Array:
    """Adds a bias over the last axes of `x`; None adds nothing."""
    return x if bias is None else x + bias.reshape((1,) * (x.ndim - bias.ndim) + bias.shape)


def visible(
    positions: Int[Array, "B T"],
    span: int,
    chunk: int | None = None,
    window: int | None = None,
    begin: Int[Array, "B T"] | None = None,
) -> Bool[Array, "B T S"]:
    """Mask of the addresses 0 to `span - 1` that a token sees: those of its sequence up to its own position.

    Args:
      positions: Positions of the tokens in their sequences; a token at -1 sees nothing.
      span: Number of addresses, `S`.
      chunk: Length in positions of a chunk: a token sees only its own chunk (Llama 4). None: no chunks.
      window: Number of tokens that a token sees, itself included. None: all before it.
      begin: Address of position 0 of each token's sequence; None is 0 for all.
    """
    key, query = jnp.arange(span, dtype=jnp.int32)[None, None], positions[:, :, None]
    if begin is not None:
        key = key - begin[:, :, None]
    mask = (key >= 0) & (key <= query)
    if chunk is not None:
        mask &= key // chunk == query // chunk
    if window is not None:
        mask &= key > query - window
    return mask


def probabilities(
    scores: Float[Array, "B H T S"], mask: Bool[Array, "B T S"], scale: float
) -> Float[Array, "B H T S"]:
    """Softmax in float32 over the positions for which the mask is True."""
    scores = jnp.where(mask[:, None], scores.astype(jnp.float32) * scale, jnp.finfo(jnp.float32).min)
    return jax.nn.softmax(scores, axis=-1)


def seen_rows(rows: Float[Array, "B S C"], mask: Bool[Array, "B T S"]) -> Float[Array, "B S C"]:
    """Replaces rows that no query sees by zeros: they may be NaN."""
    return jnp.where(jnp.any(mask, axis=1)[..., None], rows, jnp.zeros((), rows.dtype))


def swiglu(x: Float[Array, "*B D"], w: FFN) -> Float[Array, "*B D"]:
    """`(silu(x @ gate) * (x @ up)) @ down`."""
    h = einsum("...d,dgf->...gf", x, w.gate_up)
    return einsum("...f,fd->...d", jax.nn.silu(h[..., 0, :]) * h[..., 1, :], w.down)


def _tile_rows(mean: int) -> int:
    """Rows of one tile: near the mean size of a group when a large batch fills groups, small in decode."""
    return min(max(8, 1 << (max(mean, 1).bit_length() - 1)), 64)


def _tiles_at_once(rows: int) -> int:
    """Number of tiles in one turn of the loop: few if tiles are large. Each tile brings a copy of its expert,
    which pays for many rows only."""
    return max(1, 64 // rows)


class _Tiles(NamedTuple):
    """Cutting of rows into tiles.

    Attributes:
      rows: Rows of a tile.
      at_once: Tiles in one turn of the loop.
      wire: Reader of received rows; None: rows are tokens.
    """

    rows: int
    at_once: int
    wire: Wire | None


def _grouped_swiglu(
    x: Array, group: Array, layer: Array, gate_up: Tensor, down: Tensor, tiling: _Tiles
) -> Array:
    """See `grouped_swiglu`. Rows are sorted by group and cut into tiles of one group each; a loop runs over
    the tiles that exist, some at a time."""
    tile, at_once, wire = tiling
    rows, groups = x.shape[0], gate_up.shape[0]
    key = jnp.where(group < 0, groups, group)
    order = stable_argsort(key, groups + 1)
    counts = bincount(key, groups + 1)[:groups]
    start = jnp.cumsum(counts) - counts
    tiles_end = jnp.cumsum(-(-counts // tile))
    tiles_start = tiles_end - (-(-counts // tile))

    def body(step: Array, y: Array) -> Array:
        tiles = step * at_once + jnp.arange(at_once, dtype=jnp.int32)
        g = jnp.searchsorted(tiles_end, tiles, side="right", method="compare_all")
        g = jnp.minimum(g, groups - 1)
        row = ((tiles - tiles_start[g]) * tile)[:, None] + jnp.arange(tile, dtype=jnp.int32)[None]
        live = row < counts[g][:, None]  # no row in tiles beyond the last one
        source = order[jnp.where(live, start[g][:, None] + row, 0)]
        tokens = x[source] if wire is None else wire.tokens(x[source])
        # gate and up as one matrix: with an axis of two after the width, the TPU compiler copies all experts
        first = jax.tree.map(lambda a: a[g, layer].reshape(at_once, a.shape[2], -1), gate_up)
        gate, up = jnp.split(einsum("ntd,ndh->nth", tokens, first, live), 2, axis=-1)
        second = jax.tree.map(lambda a: a[g, layer], down)
        out = einsum("ntf,nfd->ntd", jax.nn.silu(gate) * up, second, live)
        return y.at[jnp.where(live, source, rows)].set(out, mode="drop")

    steps = -(-tiles_end[-1] // at_once)
    y = jnp.zeros((rows, down.shape[-1]), x.dtype if wire is None else wire.dtype)
    return jax.lax.fori_loop(0, steps, body, y)


@functools.cache
def _grouped(tiling: _Tiles) -> Callable[..., Array]:
    """Returns `_grouped_swiglu` with a rule for `vmap` over lanes.

    Lanes are folded into groups: the experts of many ranks are just more experts. The loop then still runs
    over the tiles that exist; otherwise every lane would run as many turns as the longest.
    """

    @custom_vmap
    def run(x: Array, group: Array, layer: Array, gate_up: Tensor, down: Tensor) -> Array:
        return _grouped_swiglu(x, group, layer, gate_up, down, tiling)

    @run.def_vmap
    def lanes(size, in_batched, x, group, layer, gate_up, down):  # type: ignore[no-untyped-def]
        x_b, group_b, layer_b, gate_b, _ = in_batched
        if layer_b:
            raise NotImplementedError("all lanes run the same layer")
        x = x if x_b else jnp.broadcast_to(x, (size, *x.shape))
        group = group if group_b else jnp.broadcast_to(group, (size, *group.shape))
        own_experts = all(jax.tree.leaves(gate_b))
        per_lane = gate_up.shape[1] if own_experts else gate_up.shape[0]
        if own_experts:
            offset = jnp.arange(size, dtype=group.dtype)[:, None] * per_lane
            group = jnp.where(group < 0, -1, group + offset)
            gate_up, down = jax.tree.map(lambda a: a.reshape(-1, *a.shape[2:]), (gate_up, down))
        folded = _grouped(tiling._replace(at_once=_tiles_at_once(tiling.rows)))
        flat = folded(x.reshape(-1, x.shape[-1]), group.reshape(-1), layer, gate_up, down)
        return flat.reshape(*x.shape[:-1], flat.shape[-1]), True

    return run


def grouped_swiglu(
    x: Shaped[Array, "Z M"],
    group: Int[Array, " Z"],
    w: Experts,
    layer: Int[Array, ""],
    expected: int | None = None,
    wire: Wire | None = None,
) -> Float[Array, "Z D"]:
    """SwiGLU of each row by the expert of its group (a local slot) in one layer.

    Rows of group -1 are empty: they cost nothing, may hold anything and give zeros. Rows are sorted by expert
    first, so that only the rows that are not empty cost work.

    Args:
      x: Tokens, or received rows that `wire` reads.
      group: Group of each row.
      w: The experts.
      layer: Number of the layer of these experts.
      expected: Likely number of rows that are not empty, for which tiles are sized; None: all.
      wire: Reader of received rows; None: rows are tokens.
    """
    groups, expected = max(w.gate_up.shape[0], 1), x.shape[0] if expected is None else expected
    rows = _tile_rows(expected // groups)
    at_once = min(_tiles_at_once(rows), groups + expected // rows)
    return _grouped(_Tiles(rows, at_once, wire))(x, group, layer, w.gate_up, w.down)
