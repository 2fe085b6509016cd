"""The weights as typed pytrees, and their shapes and shardings as the same classes.

`weight_tree` builds a `Weights` of whatever its `make` returns for each `Leaf`: shapes, specs,
random arrays, arrays read from a file. So a field is described once, here.
"""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any, Literal

import jax.numpy as jnp
from flax import struct

from cmx_jax.model.config import GQAConfig, MLAConfig, ModelConfig
from cmx_jax.quant import QTensor

Tensor = Any  # a jax.Array, np.ndarray, PartitionSpec or ShapeDtypeStruct, or a QTensor of two of them


@struct.dataclass
class MLA:
    """Latent attention of one layer. Without a query latent `q_a` is None and `q_b` starts from `D`."""

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
class GQA:
    """Grouped-query attention of one layer; `Y` key-value heads, each for `H / Y` query heads."""

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
    router_bias: Tensor  # [E], e_score_correction_bias: chooses experts, never weighs them; may be None
    slots: Tensor  # [X] int32, and
    first_slot: Tensor  # [E + 1] int32: a `SlotTable`; data, so that experts can move without a new program
    experts: Experts
    shared: FFN | None  # None too where it lies in slots


@struct.dataclass
class Layer:
    attn_norm: Tensor  # [D]
    attn: MLA | GQA
    attn_out_norm: Tensor  # [D], of a sandwich block, else None
    ffn_norm: Tensor  # [D], None of a parallel block
    ffn: FFN | MoE
    ffn_out_norm: Tensor  # [D], of a sandwich block, else None


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
    """One tensor of one stack: `path` inside the stack, `shape` with its layer axis.

    A field in INT8 is two leaves of one path, of kind `int8` and `scale`.
    """

    stack: Stack
    path: str
    shape: tuple[int, ...]
    kind: Literal["matrix", "norm", "router", "router_bias", "bias", "slots", "int8", "scale"] = "matrix"
    experts: bool = False  # slots in front, sharded over expert ranks
    inputs: tuple[int, ...] = (0,)  # axes of a piece along which an output channel of a matrix lies
    scales: str = "bfloat16"  # type of a scale

    @property
    def layers(self) -> int:
        """Layers of its stack (1 of what is in none)."""
        return 1 if not self.stack else self.shape[1 if self.experts else 0]

    @property
    def piece_shape(self) -> tuple[int, ...]:
        """Of one layer, of one expert where there are experts."""
        return self.shape[2:] if self.experts else self.shape[1:] if self.stack else self.shape

    def scale(self) -> "Leaf":
        """The scales of this one."""
        lead = len(self.shape) - len(self.piece_shape)
        inputs = {lead + axis for axis in self.inputs}
        shape = tuple(1 if axis in inputs else n for axis, n in enumerate(self.shape))
        return replace(self, shape=shape, kind="scale")


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


def _attention(c: ModelConfig, t: _Builder) -> MLA | GQA:
    return _mla(c, c.attention, t) if isinstance(c.attention, MLAConfig) else _gqa(c, c.attention, t)


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
    def norm(path: str, there: bool) -> Any:
        return t(path, c.hidden_size, kind="norm") if there else None

    return Layer(
        attn_norm=norm("attn_norm", True),
        attn=_attention(c, t),
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
    """A `Weights` whose leaves are `make(leaf)`.

    Args:
      c: the model.
      slots: expert slots `X` over all ranks.
      make: what to put in each place.
      mtp: whether the MTP layers are there.
      shared_in_slots: whether the shared expert lies in slots too.
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
    """Every leaf of `weight_tree` in its order."""
    found: list[Leaf] = []
    weight_tree(c, slots, found.append, mtp)
    return found


@dataclass(frozen=True)
class ParameterCounts:
    """Parameters of a model.

    Attributes:
      total: all but those of MTP layers.
      active: those that one token uses: its top-k experts, and not the input embedding unless it is the
        head too.
      mtp: of MTP layers, which share embedding and head.
    """

    total: int
    active: int
    mtp: int


def parameter_counts(c: ModelConfig) -> ParameterCounts:
    """Counts a config's parameters (section 9)."""
    leaves = all_leaves(c, c.n_routed_experts)

    def total(chosen: Iterable[Leaf]) -> int:
        return sum(math.prod(leaf.shape) for leaf in chosen if leaf.kind not in ("slots", "scale"))

    main = [leaf for leaf in leaves if leaf.stack != "mtp"]
    experts = total(leaf for leaf in main if leaf.experts)
    used = experts * c.num_experts_per_tok // max(c.n_routed_experts, 1)
    embed = 0 if c.tie_word_embeddings else c.vocab_size * c.hidden_size
    whole = total(main)
    return ParameterCounts(
        whole, whole - experts + used - embed, total(x for x in leaves if x.stack == "mtp")
    )


def split_experts(stack: Layer) -> tuple[Layer, Experts]:
    """A stack without its experts, to be scanned over, and the experts (empty of dense layers)."""
    if not isinstance(stack.ffn, MoE):
        return stack, Experts(None, None)
    return stack.replace(ffn=stack.ffn.replace(experts=Experts(None, None))), stack.ffn.experts


def leaf_dtype(leaf: Leaf, dtype: Any) -> Any:
    """Router and its bias stay float32 (the paper's mixed precision, section 4.5), placement int32."""
    own = {"slots": "int32", "int8": "int8", "scale": leaf.scales}
    if leaf.kind in own:
        return jnp.dtype(own[leaf.kind])
    return jnp.dtype(jnp.float32) if leaf.kind in ("router", "router_bias") else jnp.dtype(dtype)


FLOAT_FIELDS = ("embed", "head", "attn.k_b", "attn.v_b")
"""Never INT8: what is small and sensitive (section 4.5), and what absorbed attention is made of."""


def int8_fields(c: ModelConfig, mtp: bool = True) -> frozenset[tuple[str, str]]:
    """Stack and path of every matrix that may be INT8: FFN and attention's projections."""
    leaves = all_leaves(c, c.n_routed_experts, mtp)
    large = ("matrix", "int8")
    return frozenset((x.stack, x.path) for x in leaves if x.kind in large and x.path not in FLOAT_FIELDS)
