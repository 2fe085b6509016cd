"""The architecture as data. `families` reads it from a `config.json`.

One decoder serves every family: families differ in the fields below. Field names are those of Hugging Face
where it has one.
"""

import math
from dataclasses import dataclass
from typing import Literal

from cmx_jax.model.limits import LARGEST, MAX_EXPERTS, expect


@dataclass(frozen=True, kw_only=True)
class RopeConfig:
    """Rotary embedding. Fields from `factor` on matter only to kinds `linear`, `yarn` (arXiv 2309.00071) and
    `llama3`."""

    theta: float = 10000.0
    interleaved: bool = False  # pairs are (0, 1), (2, 3), ... instead of (i, i + R/2)
    kind: Literal["default", "linear", "yarn", "llama3"] = "default"
    factor: float = 1.0
    original_max_position_embeddings: int = 4096
    attention_factor: float | None = None
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool = True
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0

    def temperature(self, mscale: float) -> float:
        """YaRN's attention temperature `0.1 * mscale * ln(factor) + 1` (1 without extension)."""
        return 1.0 if self.factor <= 1 else 0.1 * mscale * math.log(self.factor) + 1.0


@dataclass(frozen=True, kw_only=True)
class MLAConfig:
    """Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434): one latent per token for all heads."""

    kv_lora_rank: int
    qk_nope_head_dim: int
    qk_rope_head_dim: int
    v_head_dim: int
    q_lora_rank: int | None = None
    latent_norm_eps: float = 1e-6  # for the norms of the query latent and the key-value latent

    @property
    def qk_head_dim(self) -> int:
        return self.qk_nope_head_dim + self.qk_rope_head_dim

    @property
    def row_dim(self) -> int:
        """Numbers in a cached row: the latent and the rotated key, `C = A + R`."""
        return self.kv_lora_rank + self.qk_rope_head_dim

    @property
    def row_parts(self) -> tuple[int, ...]:
        """Widths of the parts of a cached row that differ in magnitude: latent, rotated key."""
        return self.kv_lora_rank, self.qk_rope_head_dim


@dataclass(frozen=True, kw_only=True)
class GQAConfig:
    """Grouped-query attention (multi-query with one key-value head).

    Attributes:
      num_key_value_heads: Number of key-value heads; each serves the same number of consecutive query heads.
      head_dim: Width of a head.
      qk_norm: RMSNorm of each head's query and key: `weighted` before rotation (Qwen3), `l2` without weights
        after rotation and only in layers with rotation (Llama 4).
      sliding_window: Number of tokens that a token sees, itself included; None: all before it.
      chunk_size: Length in positions of a chunk; in chunked layers a token sees only its own chunk.
      temperature_scale: Scale of Llama 4's query temperature: in layers without rotation queries are
        multiplied by `1 + scale * ln(1 + floor((position + 1) / floor))`; 0 for none.
      temperature_floor: `floor` in that formula.
    """

    num_key_value_heads: int
    head_dim: int
    qk_norm: Literal["none", "weighted", "l2"] = "none"
    sliding_window: int | None = None
    chunk_size: int | None = None
    temperature_scale: float = 0.0
    temperature_floor: int = 8192

    @property
    def row_dim(self) -> int:
        """Numbers in a cached row: the keys of all heads, then the values of all heads, `C = 2 Y N`."""
        return 2 * self.num_key_value_heads * self.head_dim

    @property
    def row_parts(self) -> tuple[int, ...]:
        """Widths of the parts of a cached row that differ in magnitude: each head's key or value."""
        return (self.head_dim,) * (2 * self.num_key_value_heads)


@dataclass(frozen=True)
class LayerKind:
    """Properties in which layers of one model may differ.

    Attributes:
      moe: True if the FFN is a mixture of experts.
      rope: True if queries and keys are rotated.
      chunked: True if attention is within chunks (`GQAConfig.chunk_size`).
    """

    moe: bool
    rope: bool = True
    chunked: bool = False


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """A decoder-only transformer, mixture-of-experts or dense.

    Attributes:
      family: Name of the family, which decides the names of tensors (`cmx_jax.model.checkpoint.names`).
      intermediate_size: Hidden width of the FFN of dense layers.
      layers: Kind of each layer.
      weigh_input: True if a router's weight scales the input of an expert instead of its result.
      scoring: Router score function. With `router_bias`, a correction bias is used for selection but not for
        weighting.
      block: Placement of norms: `pre`: before attention and before the FFN; `sandwich`: also after each;
        `parallel`: one norm, attention and FFN side by side.
      norm: RMSNorm, or LayerNorm without bias.
      int8: Fields (stack and path, see `cmx_jax.model.weights`) that are INT8. They are not part of a
        config.json but of how a model is loaded.
      int8_scales: Type of the scales of INT8 fields.
    """

    family: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_attention_heads: int
    attention: MLAConfig | GQAConfig
    layers: tuple[LayerKind, ...]
    moe_intermediate_size: int = 0
    n_routed_experts: int = 0
    num_experts_per_tok: int = 0
    n_shared_experts: int = 0
    n_group: int = 1
    topk_group: int = 1
    scoring: Literal["sigmoid", "softmax"] = "sigmoid"
    router_bias: bool = False
    norm_topk_prob: bool = True
    routed_scaling_factor: float = 1.0
    weigh_input: bool = False
    block: Literal["pre", "sandwich", "parallel"] = "pre"
    norm: Literal["rms", "layer"] = "rms"
    rms_norm_eps: float = 1e-6
    rope: RopeConfig = RopeConfig()
    attention_bias: bool = False
    tie_word_embeddings: bool = False
    max_position_embeddings: int = 4096
    num_nextn_predict_layers: int = 0
    eos_token_ids: tuple[int, ...] = ()
    int8: frozenset[tuple[str, str]] = frozenset()
    int8_scales: str = "bfloat16"

    def __post_init__(self) -> None:
        _check(self)

    @property
    def num_hidden_layers(self) -> int:
        return len(self.layers)

    @property
    def num_dense_layers(self) -> int:
        return sum(not kind.moe for kind in self.layers)

    @property
    def num_moe_layers(self) -> int:
        return sum(kind.moe for kind in self.layers)

    @property
    def row_dim(self) -> int:
        """Numbers in a cached row, `C`: one row per token and layer."""
        return self.attention.row_dim

    @property
    def row_parts(self) -> tuple[int, ...]:
        """Widths of the parts of a cached row that differ in magnitude."""
        return self.attention.row_parts

    @property
    def softmax_scale(self) -> float:
        """`1 / sqrt(width of a key)`, for MLA times YaRN's squared `mscale_all_dim` correction."""
        a, rope = self.attention, self.rope
        if isinstance(a, GQAConfig):
            return a.head_dim**-0.5
        corrected = rope.kind != "default" and rope.mscale_all_dim
        return a.qk_head_dim**-0.5 * (rope.temperature(rope.mscale_all_dim or 0) ** 2 if corrected else 1.0)


MAX_PERIOD = 16  # longest pattern of layers that is looked for


def segments(kinds: tuple[LayerKind, ...]) -> list[tuple[int, tuple[LayerKind, ...]]]:
    """Splits layers into repeated patterns `(times, pattern)`.

    61 layers of which the first 3 are dense are `[(3, (dense,)), (58, (moe,))]`; 48 layers of which every
    fourth lacks rotation are `[(12, (rope, rope, rope, nope))]`.
    """
    result, start = [], 0
    while start < len(kinds):
        best, best_times = kinds[start : start + 1], 1
        for period in range(1, min(MAX_PERIOD, len(kinds) - start) + 1):
            pattern, times = kinds[start : start + period], 1
            while kinds[start + times * period : start + (times + 1) * period] == pattern:
                times += 1
            if times > 1 and times * period > best_times * len(best):
                best, best_times = pattern, times
        result.append((best_times, best))
        start += best_times * len(best)
    return result


def _sizes(c: ModelConfig) -> dict[str, int]:
    """Widths and counts that must be positive, by field."""
    fields = [
        "vocab_size",
        "hidden_size",
        "num_hidden_layers",
        "num_attention_heads",
        "max_position_embeddings",
    ]
    fields += ["intermediate_size"] * (c.num_dense_layers > 0)
    if c.num_moe_layers or c.num_nextn_predict_layers:
        fields += [
            "moe_intermediate_size",
            "n_routed_experts",
            "num_experts_per_tok",
            "n_group",
            "topk_group",
        ]
    sizes = {field: getattr(c, field) for field in fields}
    attention = vars(c.attention).items()
    return sizes | {f: v for f, v in attention if isinstance(v, int) and not isinstance(v, bool)}


def _check(c: ModelConfig) -> None:
    for field, size in _sizes(c).items():
        expect(size > 0, field, size, "a positive integer")
        expect(size <= LARGEST.get(field, size), field, size, f"at most {LARGEST.get(field)}")
    for field in ("n_shared_experts", "num_nextn_predict_layers"):
        expect(getattr(c, field) >= 0, field, getattr(c, field), "zero or more")
        expect(getattr(c, field) <= LARGEST[field], field, getattr(c, field), f"at most {LARGEST[field]}")
    expect(c.rms_norm_eps > 0, "rms_norm_eps", c.rms_norm_eps, "a positive number")
    expect(c.rope.theta > 1, "rope_theta", c.rope.theta, "a number above 1")
    rope = ("factor", "beta_fast", "beta_slow", "low_freq_factor", "original_max_position_embeddings")
    for field in rope:
        expect(getattr(c.rope, field) > 0, field, getattr(c.rope, field), "a positive number")
    low, high = c.rope.low_freq_factor, c.rope.high_freq_factor
    expect(
        c.rope.kind != "llama3" or high >= low, "high_freq_factor", high, f"at least low_freq_factor ({low})"
    )
    _check_attention(c)
    if c.num_moe_layers:  # a dense model's config may name an MTP layer that does not exist
        _check_router(c)


def _check_attention(c: ModelConfig) -> None:
    a, heads = c.attention, c.num_attention_heads
    if isinstance(a, MLAConfig):
        expect(a.qk_rope_head_dim % 2 == 0, "qk_rope_head_dim", a.qk_rope_head_dim, "an even number")
        return
    expect(a.head_dim % 2 == 0, "head_dim", a.head_dim, "an even number")
    groups = a.num_key_value_heads
    expect(heads % groups == 0, "num_key_value_heads", groups, f"a divisor of num_attention_heads ({heads})")


def _check_router(c: ModelConfig) -> None:
    experts, groups = c.n_routed_experts, c.n_group
    limit = MAX_EXPERTS // (c.num_moe_layers + c.num_nextn_predict_layers)
    expect(experts <= limit, "n_routed_experts", experts, f"at most {limit} in each of so many layers")
    expect(experts % groups == 0, "n_group", groups, f"a divisor of n_routed_experts ({experts})")
    expect(experts // groups >= 2 or groups == 1, "n_group", groups, "two or more experts a group")
    expect(c.topk_group <= groups, "topk_group", c.topk_group, f"at most n_group ({groups})")
    reachable = experts // groups * c.topk_group
    expect(
        c.num_experts_per_tok <= reachable,
        "num_experts_per_tok",
        c.num_experts_per_tok,
        f"at most the {reachable} experts of topk_group groups",
    )
