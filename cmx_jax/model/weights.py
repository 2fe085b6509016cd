"""The weights as typed pytrees, and their shapes and shardings as the same classes.

`weight_tree` builds a `Weights` of whatever its `make` returns for each `Leaf`: shapes, specs,
random arrays, arrays read from a file. So a field is described once, here.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax.sharding import PartitionSpec as P

from cmx_jax.model.config import ModelConfig

Tensor = Any  # a jax.Array, np.ndarray, PartitionSpec or ShapeDtypeStruct


@struct.dataclass
class Attention:
    """MLA of one layer. Without a query latent `q_a` and `q_norm` are None and `q_b` starts from `D`."""

    q_a: Tensor  # [D, Q]
    q_a_bias: Tensor  # [Q], None unless attention_bias
    q_norm: Tensor  # [Q]
    q_b: Tensor  # [Q or D, H, N + R]
    kv_a: Tensor  # [D, C + R]
    kv_a_bias: Tensor  # [C + R], None unless attention_bias
    kv_norm: Tensor  # [C]
    k_b: Tensor  # [H, N, C]: latent to key; absorbed into the query in decode
    v_b: Tensor  # [H, V, C]: latent to value; absorbed into the output in decode
    o: Tensor  # [H, V, D]
    o_bias: Tensor  # [D], None unless attention_bias


@struct.dataclass
class FFN:
    """SwiGLU: `(silu(x @ gate) * (x @ up)) @ down`, gate and up side by side."""

    gate_up: Tensor  # [D, 2, F]
    down: Tensor  # [F, D]


@struct.dataclass
class Experts:
    """Routed experts of all layers of a stack, in slots; a rank holds `X / G` consecutive slots.

    The layer is the second axis and is not scanned over: cutting a layer out would copy all of its experts in
    every step, while indexing by slot and layer reads those that are used.
    """

    gate_up: Tensor  # [X, L, D, 2, F]
    down: Tensor  # [X, L, F, D]


@struct.dataclass
class MoE:
    """Router (float32), expert placement, experts, shared expert (None if the model has none)."""

    router: Tensor  # [E, D]
    router_bias: Tensor  # [E], e_score_correction_bias: chooses experts, never weighs them
    slot_of_expert: Tensor  # [E] int32: data, so that experts can move without a new program
    experts: Experts
    shared: FFN | None


@struct.dataclass
class Layer:
    attn_norm: Tensor  # [D]
    attn: Attention
    ffn_norm: Tensor  # [D]
    ffn: FFN | MoE


@struct.dataclass
class MTP:
    """Multi-token-prediction layer: `layer(eh_proj([enorm(embedding); hnorm(hidden)]))`, then `norm`.

    Embedding and head are the main model's.
    """

    enorm: Tensor  # [D]
    hnorm: Tensor  # [D]
    eh_proj: Tensor  # [2 D, D]
    layer: Layer
    norm: Tensor  # [D]


@struct.dataclass
class Weights:
    """The whole model; `dense`, `moe` and `mtp` have a leading layer axis `L` (`Experts`: a second one)."""

    embed: Tensor  # [O, D]
    dense: Layer | None
    moe: Layer | None
    norm: Tensor  # [D]
    head: Tensor  # [D, O], None when tied to `embed`
    mtp: MTP | None


Stack = Literal["", "dense", "moe", "mtp"]


@dataclass(frozen=True)
class Leaf:
    """One tensor of one stack: `path` inside the stack, `shape` with its layer axis."""

    stack: Stack
    path: str
    shape: tuple[int, ...]
    kind: Literal["matrix", "norm", "router", "router_bias", "bias", "slots"] = "matrix"
    experts: bool = False  # slots in front, sharded over expert ranks


class _Builder:
    """Makes the leaves of one stack, so that the shape table below stays a table."""

    def __init__(self, stack: Stack, layers: int, make: Callable[[Leaf], Any]):
        self.stack, self.make = stack, make
        self.lead = (layers,) if stack else ()

    def __call__(self, path: str, *shape: int, **kind: Any) -> Any:
        if kind.get("experts"):
            return self.make(Leaf(self.stack, path, shape[:1] + self.lead + shape[1:], **kind))
        return self.make(Leaf(self.stack, path, self.lead + shape, **kind))


def _attention(c: ModelConfig, t: _Builder) -> Attention:
    heads, query = c.num_attention_heads, c.q_lora_rank
    nope, value, rank = c.qk_nope_head_dim, c.v_head_dim, c.kv_lora_rank
    bias = c.attention_bias
    return Attention(
        q_a=t("attn.q_a", c.hidden_size, query) if query else None,
        q_a_bias=t("attn.q_a_bias", query, kind="bias") if query and bias else None,
        q_norm=t("attn.q_norm", query, kind="norm") if query else None,
        q_b=t("attn.q_b", query or c.hidden_size, heads, nope + c.qk_rope_head_dim),
        kv_a=t("attn.kv_a", c.hidden_size, c.latent_dim),
        kv_a_bias=t("attn.kv_a_bias", c.latent_dim, kind="bias") if bias else None,
        kv_norm=t("attn.kv_norm", rank, kind="norm"),
        k_b=t("attn.k_b", heads, nope, rank),
        v_b=t("attn.v_b", heads, value, rank),
        o=t("attn.o", heads, value, c.hidden_size),
        o_bias=t("attn.o_bias", c.hidden_size, kind="bias") if bias else None,
    )


def _ffn(t: _Builder, path: str, width: int, hidden: int) -> FFN:
    return FFN(t(f"{path}.gate_up", width, 2, hidden), t(f"{path}.down", hidden, width))


def _moe(c: ModelConfig, t: _Builder, slots: int) -> MoE:
    width, hidden, experts = c.hidden_size, c.moe_intermediate_size, c.n_routed_experts
    shared = c.n_shared_experts * hidden
    return MoE(
        router=t("ffn.router", experts, width, kind="router"),
        router_bias=t("ffn.router_bias", experts, kind="router_bias"),
        slot_of_expert=t("ffn.slot_of_expert", experts, kind="slots"),
        experts=Experts(
            t("ffn.experts.gate_up", slots, width, 2, hidden, experts=True),
            t("ffn.experts.down", slots, hidden, width, experts=True),
        ),
        shared=_ffn(t, "ffn.shared", width, shared) if shared else None,
    )


def _layer(c: ModelConfig, t: _Builder, ffn: FFN | MoE) -> Layer:
    return Layer(
        attn_norm=t("attn_norm", c.hidden_size, kind="norm"),
        attn=_attention(c, t),
        ffn_norm=t("ffn_norm", c.hidden_size, kind="norm"),
        ffn=ffn,
    )


def weight_tree(c: ModelConfig, slots: int, make: Callable[[Leaf], Any], mtp: bool = True) -> Weights:
    """A `Weights` whose leaves are `make(leaf)`.

    Args:
      c: the model.
      slots: expert slots `X` over all ranks.
      make: what to put in each place.
      mtp: whether the MTP layers are there.
    """
    width = c.hidden_size
    top = _Builder("", 0, make)
    dense = _Builder("dense", c.num_dense_layers, make)
    moe = _Builder("moe", c.num_moe_layers, make)
    extra = _Builder("mtp", c.num_nextn_predict_layers, make)
    return Weights(
        embed=top("embed", c.vocab_size, width),
        dense=_layer(c, dense, _ffn(dense, "ffn", width, c.intermediate_size))
        if c.num_dense_layers
        else None,
        moe=_layer(c, moe, _moe(c, moe, slots)) if c.num_moe_layers else None,
        norm=top("norm", width, kind="norm"),
        head=None if c.tie_word_embeddings else top("head", width, c.vocab_size),
        mtp=MTP(
            enorm=extra("enorm", width, kind="norm"),
            hnorm=extra("hnorm", width, kind="norm"),
            eh_proj=extra("eh_proj", 2 * width, width),
            layer=_layer(c, extra, _moe(c, extra, slots)),
            norm=extra("norm", width, kind="norm"),
        )
        if mtp and c.num_nextn_predict_layers
        else None,
    )


def split_experts(stack: Layer) -> tuple[Layer, Experts]:
    """A stack without its experts, to be scanned over, and the experts (empty of dense layers)."""
    if not isinstance(stack.ffn, MoE):
        return stack, Experts(None, None)
    return stack.replace(ffn=stack.ffn.replace(experts=Experts(None, None))), stack.ffn.experts


def place_experts(weights: Weights, slot_of_expert: np.ndarray, slots: int) -> Weights:
    """Whole NumPy weights that have expert `e` in slot `e`, with their experts moved to other slots.

    Args:
      weights: experts in slots 0 to `E - 1`.
      slot_of_expert: int32 [E].
      slots: `X`; slots without an expert are zero.
    """

    def spread(field: np.ndarray) -> np.ndarray:  # [E, L, ...] -> [X, L, ...]
        placed = np.zeros((slots, *field.shape[1:]), field.dtype)
        placed[slot_of_expert] = field
        return placed

    def move(layer: Layer) -> Layer:
        if not isinstance(layer.ffn, MoE):
            return layer
        table = np.broadcast_to(slot_of_expert, layer.ffn.slot_of_expert.shape).astype(np.int32)
        experts = jax.tree.map(spread, layer.ffn.experts)
        return layer.replace(ffn=layer.ffn.replace(experts=experts, slot_of_expert=table))

    return weights.replace(
        moe=weights.moe and move(weights.moe),
        mtp=weights.mtp and weights.mtp.replace(layer=move(weights.mtp.layer)),
    )


def leaf_dtype(leaf: Leaf, dtype: Any) -> Any:
    """Router and its bias stay float32 (the paper's mixed precision, section 4.5), placement int32."""
    if leaf.kind == "slots":
        return jnp.dtype(jnp.int32)
    return jnp.dtype(jnp.float32) if leaf.kind in ("router", "router_bias") else jnp.dtype(dtype)


def abstract_weights(c: ModelConfig, slots: int, dtype: Any, mtp: bool = True) -> Weights:
    """Shapes and dtypes without arrays."""
    return weight_tree(c, slots, lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf_dtype(leaf, dtype)), mtp)


def weight_specs(c: ModelConfig, expert_axes: tuple[str, ...], mtp: bool = True) -> Weights:
    """Experts over `expert_axes`, everything else replicated (data-parallel attention, section 2)."""
    spec = {True: P(expert_axes), False: P()}
    return weight_tree(c, 1, lambda leaf: spec[leaf.experts], mtp)
