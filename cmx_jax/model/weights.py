"""The weights as typed pytrees, and their shapes and shardings as the same classes.

`weight_tree` builds a `Weights` out of the results of `make` for each `Leaf`: shapes, specs, random arrays,
arrays read from a file. So each field is described once, here.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from flax import struct

from cmx_jax.model.config import GQAConfig, MLAConfig, ModelConfig
from cmx_jax.model.leaf import Leaf, Stack
from cmx_jax.quant import QTensor

Tensor = Any  # a jax.Array, np.ndarray, PartitionSpec or ShapeDtypeStruct, or a QTensor of two of them


@struct.dataclass
class MLA:
    """Latent attention of one layer. Without a query latent `q_a` is None and `q_b` has `D` inputs."""

    q_a: Tensor  # [D, Q]
    q_a_bias: Tensor  # [Q], None unless attention_bias
    q_norm: Tensor  # [Q]
    q_b: Tensor  # [Q or D, H, N + R]
    kv_a: Tensor  # [D, A + R]
    kv_a_bias: Tensor  # [A + R], None unless attention_bias
    kv_norm: Tensor  # [A]
    k_b: Tensor  # [H, N, A]: latent to key; absorbed into the query in decode
    v_b: Tensor  # [H, V, A]: latent to value; absorbed into the output in decode
    o: Tensor  # [H, V, D]
    o_bias: Tensor  # [D], None unless attention_bias


@struct.dataclass
class GQA:
    """Grouped-query attention of one layer: `Y` key-value heads, each for `H / Y` query heads."""

    q: Tensor  # [D, H, N]
    k: Tensor  # [D, Y, N]
    v: Tensor  # [D, Y, N]
    o: Tensor  # [H, N, D]
    q_norm: Tensor  # [N], None unless qk_norm is weighted
    k_norm: Tensor  # [N]
    q_bias: Tensor  # [H, N], None unless attention_bias
    k_bias: Tensor  # [Y, N]
    v_bias: Tensor  # [Y, N]
    o_bias: Tensor  # [D]


@struct.dataclass
class FFN:
    """SwiGLU: `(silu(x @ gate) * (x @ up)) @ down`, with gate and up in one array."""

    gate_up: Tensor  # [D, 2, F]
    down: Tensor  # [F, D]


@struct.dataclass
class Experts:
    """Routed experts of all layers of a stack, in slots; a rank holds `X / G` consecutive slots.

    The layer is the second axis and is not scanned over: cutting a layer out would copy all of its experts in
    every step, while indexing by slot and layer reads only experts that are used.
    """

    gate_up: Tensor  # [X, L, D, 2, F]
    down: Tensor  # [X, L, F, D]


@struct.dataclass
class MoE:
    """Router (float32), expert placement, experts, shared expert (None if the model has none)."""

    router: Tensor  # [E, D]
    router_bias: Tensor  # [E], e_score_correction_bias: selects experts, never weighs them; may be None
    slots: Tensor  # [X] int32, and
    first_slot: Tensor  # [E + 1] int32: a `SlotTable`; data, so that experts can move without a new program
    experts: Experts
    shared: FFN | None  # also None where shared experts have slots


@struct.dataclass
class Layer:
    """One layer: norms, attention, FFN."""

    attn_norm: Tensor  # [D]
    attn: MLA | GQA
    attn_out_norm: Tensor  # [D], None unless the block is a sandwich
    ffn_norm: Tensor  # [D], None if the block is parallel
    ffn: FFN | MoE
    ffn_out_norm: Tensor  # [D], None unless the block is a sandwich


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
    """The whole model; `dense`, `moe` and `mtp` have a leading layer axis `L` (in `Experts` the second)."""

    embed: Tensor  # [O, D]
    dense: Layer | None
    moe: Layer | None
    norm: Tensor  # [D]
    head: Tensor  # [D, O], None when tied to `embed`
    mtp: MTP | None


class _Builder:
    """Makes the leaves of one stack, so that the shape table below stays a table."""

    def __init__(self, stack: Stack, layers: int, c: ModelConfig, make: Callable[[Leaf], Any]):
        self.stack, self.make, self.c = stack, make, c
        self.lead = (layers,) if stack else ()

    def __call__(self, path: str, *shape: int, **kind: Any) -> Any:
        shape = shape[:1] + self.lead + shape[1:] if kind.get("experts") else self.lead + shape
        leaf = Leaf(self.stack, path, shape, **kind)
        if (self.stack, path) not in self.c.int8:
            return self.make(leaf)
        leaf = replace(leaf, kind="int8", scales=self.c.int8_scales)
        return QTensor(self.make(leaf), self.make(leaf.scale()))


def _mla(c: ModelConfig, a: MLAConfig, t: _Builder) -> MLA:
    width, heads, query, bias = c.hidden_size, c.num_attention_heads, a.q_lora_rank, c.attention_bias
    return MLA(
        q_a=t("attn.q_a", width, query) if query else None,
        q_a_bias=t("attn.q_a_bias", query, kind="bias") if query and bias else None,
        q_norm=t("attn.q_norm", query, kind="norm") if query else None,
        q_b=t("attn.q_b", query or width, heads, a.qk_head_dim),
        kv_a=t("attn.kv_a", width, a.row_dim),
        kv_a_bias=t("attn.kv_a_bias", a.row_dim, kind="bias") if bias else None,
        kv_norm=t("attn.kv_norm", a.kv_lora_rank, kind="norm"),
        k_b=t("attn.k_b", heads, a.qk_nope_head_dim, a.kv_lora_rank, inputs=(2,)),
        v_b=t("attn.v_b", heads, a.v_head_dim, a.kv_lora_rank, inputs=(2,)),
        o=t("attn.o", heads, a.v_head_dim, width, inputs=(0, 1)),
        o_bias=t("attn.o_bias", width, kind="bias") if bias else None,
    )


def _gqa(c: ModelConfig, a: GQAConfig, t: _Builder) -> GQA:
    width, heads, groups, dim = c.hidden_size, c.num_attention_heads, a.num_key_value_heads, a.head_dim
    normed, bias = a.qk_norm == "weighted", c.attention_bias
    return GQA(
        q=t("attn.q", width, heads, dim),
        k=t("attn.k", width, groups, dim),
        v=t("attn.v", width, groups, dim),
        o=t("attn.o", heads, dim, width, inputs=(0, 1)),
        q_norm=t("attn.q_norm", dim, kind="norm") if normed else None,
        k_norm=t("attn.k_norm", dim, kind="norm") if normed else None,
        q_bias=t("attn.q_bias", heads, dim, kind="bias") if bias else None,
        k_bias=t("attn.k_bias", groups, dim, kind="bias") if bias else None,
        v_bias=t("attn.v_bias", groups, dim, kind="bias") if bias else None,
        o_bias=t("attn.o_bias", width, kind="bias") if bias else None,
    )


def _ffn(t: _Builder, path: str, width: int, hidden: int) -> FFN:
    return FFN(t(f"{path}.gate_up", width, 2, hidden), t(f"{path}.down", hidden, width))


def _moe(c: ModelConfig, t: _Builder, slots: int, shared_in_slots: bool) -> MoE:
    width, hidden, experts = c.hidden_size, c.moe_intermediate_size, c.n_routed_experts
    shared = 0 if shared_in_slots else c.n_shared_experts * hidden
    placed = experts + (c.n_shared_experts if shared_in_slots else 0)
    return MoE(
        router=t("ffn.router", experts, width, kind="router"),
        router_bias=t("ffn.router_bias", experts, kind="router_bias") if c.router_bias else None,
        slots=t("ffn.slots", slots, kind="slots"),
        first_slot=t("ffn.first_slot", placed + 1, kind="slots"),
        experts=Experts(
            t("ffn.experts.gate_up", slots, width, 2, hidden, experts=True),
            t("ffn.experts.down", slots, hidden, width, experts=True),
        ),
        shared=_ffn(t, "ffn.shared", width, shared) if shared else None,
    )


def _layer(c: ModelConfig, t: _Builder, ffn: FFN | MoE) -> Layer:
    def norm(path: str, exists: bool) -> Any:
        return t(path, c.hidden_size, kind="norm") if exists else None

    a = c.attention
    return Layer(
        attn_norm=norm("attn_norm", True),
        attn=_mla(c, a, t) if isinstance(a, MLAConfig) else _gqa(c, a, t),
        attn_out_norm=norm("attn_out_norm", c.block == "sandwich"),
        ffn_norm=norm("ffn_norm", c.block != "parallel"),
        ffn=ffn,
        ffn_out_norm=norm("ffn_out_norm", c.block == "sandwich"),
    )


def weight_tree(
    c: ModelConfig,
    slots: int,
    make: Callable[[Leaf], Any],
    mtp: bool = True,
    shared_in_slots: bool = False,
) -> Weights:
    """Builds a `Weights` whose leaves are `make(leaf)`.

    Args:
      c: The model.
      slots: Number of expert slots `X` over all ranks.
      make: Makes the value of each leaf.
      mtp: True to include MTP layers.
      shared_in_slots: True if shared experts have slots too.
    """
    width = c.hidden_size
    top = _Builder("", 0, c, make)
    dense = _Builder("dense", c.num_dense_layers, c, make)
    moe = _Builder("moe", c.num_moe_layers, c, make)
    extra = _Builder("mtp", c.num_nextn_predict_layers, c, make)
    return Weights(
        embed=top("embed", c.vocab_size, width),
        dense=_layer(c, dense, _ffn(dense, "ffn", width, c.intermediate_size))
        if c.num_dense_layers
        else None,
        moe=_layer(c, moe, _moe(c, moe, slots, shared_in_slots)) if c.num_moe_layers else None,
        norm=top("norm", width, kind="norm"),
        head=None if c.tie_word_embeddings else top("head", width, c.vocab_size),
        mtp=MTP(
            enorm=extra("enorm", width, kind="norm"),
            hnorm=extra("hnorm", width, kind="norm"),
            eh_proj=extra("eh_proj", 2 * width, width),
            layer=_layer(c, extra, _moe(c, extra, slots, shared_in_slots)),
            norm=extra("norm", width, kind="norm"),
        )
        if mtp and c.num_nextn_predict_layers
        else None,
    )


def all_leaves(c: ModelConfig, slots: int, mtp: bool = True) -> list[Leaf]:
    """All leaves of `weight_tree`, in its order."""
    leaves: list[Leaf] = []
    weight_tree(c, slots, leaves.append, mtp)
    return leaves


def split_experts(stack: Layer) -> tuple[Layer, Experts]:
    """Splits a stack into layers without experts, to be scanned over, and experts (empty if dense)."""
    if not isinstance(stack.ffn, MoE):
        return stack, Experts(None, None)
    return replace(stack, ffn=replace(stack.ffn, experts=Experts(None, None))), stack.ffn.experts


FLOAT_FIELDS = ("embed", "head", "attn.k_b", "attn.v_b")
"""Matrices that are never INT8: small and sensitive ones (section 4.5), and those of absorbed attention."""


def int8_fields(c: ModelConfig, mtp: bool = True) -> frozenset[tuple[str, str]]:
    """Stack and path of every matrix that may be INT8: FFN and attention's projections."""
    leaves = all_leaves(c, c.n_routed_experts, mtp)
    large = ("matrix", "int8")
    return frozenset((x.stack, x.path) for x in leaves if x.kind in large and x.path not in FLOAT_FIELDS)
