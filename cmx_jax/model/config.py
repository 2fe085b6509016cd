"""The architecture as data, read from a Hugging Face `config.json`.

Field names are Hugging Face's. The styles of transformers 4 (`rope_scaling`) and 5 (`rope_parameters`) are
read; the stored type (`torch_dtype`, `dtype`) is read off each tensor instead. What would be computed wrongly
is refused by name, never ignored.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cmx_jax.errors import CmxError


@dataclass(frozen=True, kw_only=True)
class RopeConfig:
    """Rotary embedding; `factor` onwards only matter to `linear` and `yarn` (arXiv 2309.00071)."""

    theta: float = 10000.0
    kind: str = "default"
    factor: float = 1.0
    original_max_position_embeddings: int = 4096
    attention_factor: float | None = None
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool = True


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """A DeepSeek-V3-architecture decoder: MLA, leading dense layers, then MoE layers, MTP layers."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    moe_intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    kv_lora_rank: int
    qk_nope_head_dim: int
    qk_rope_head_dim: int
    v_head_dim: int
    n_routed_experts: int
    num_experts_per_tok: int
    q_lora_rank: int | None = None
    n_shared_experts: int = 1
    n_group: int = 1
    topk_group: int = 1
    norm_topk_prob: bool = True
    routed_scaling_factor: float = 1.0
    first_k_dense_replace: int = 0
    rms_norm_eps: float = 1e-6
    rope: RopeConfig = RopeConfig()
    rope_interleave: bool = True
    attention_bias: bool = False
    tie_word_embeddings: bool = False
    max_position_embeddings: int = 4096
    num_nextn_predict_layers: int = 0
    eos_token_ids: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        _check(self)

    @property
    def num_dense_layers(self) -> int:
        """Leading layers whose FFN is dense."""
        return min(self.first_k_dense_replace, self.num_hidden_layers)

    @property
    def num_moe_layers(self) -> int:
        return self.num_hidden_layers - self.num_dense_layers

    @property
    def latent_dim(self) -> int:
        """Numbers that the cache keeps per token and layer: `C + R`."""
        return self.kv_lora_rank + self.qk_rope_head_dim

    @property
    def softmax_scale(self) -> float:
        """`(N + R)^-0.5`, times YaRN's squared `mscale_all_dim` correction (DeepSeek-V3)."""
        from cmx_jax.model.rope import yarn_mscale

        scale = (self.qk_nope_head_dim + self.qk_rope_head_dim) ** -0.5
        if self.rope.kind != "default" and self.rope.mscale_all_dim:
            scale *= yarn_mscale(self.rope.factor, self.rope.mscale_all_dim) ** 2
        return scale


_POSITIVE = (
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
    *("kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim", "max_position_embeddings"),
)
_POSITIVE_IF_MOE = (
    *("moe_intermediate_size", "n_routed_experts", "num_experts_per_tok", "n_group", "topk_group"),
)


# Far beyond any model; what is larger is a mistake, and would take all memory before it showed.
_MOST = {
    "num_hidden_layers": 10_000,
    "num_nextn_predict_layers": 100,
    "n_routed_experts": 100_000,
    "n_shared_experts": 1_000,
}


def _expect(ok: bool, field: str, given: object, expected: str) -> None:
    if not ok:
        raise CmxError(f"config: {field} is {given!r}, expected {expected}")


def _check(c: ModelConfig) -> None:
    for field in _POSITIVE + (_POSITIVE_IF_MOE if c.num_moe_layers > 0 else ()):
        _expect(getattr(c, field) > 0, field, getattr(c, field), "a positive integer")
    for field in ("n_shared_experts", "first_k_dense_replace", "num_nextn_predict_layers"):
        _expect(getattr(c, field) >= 0, field, getattr(c, field), "zero or more")
    for field, most in _MOST.items():
        _expect(getattr(c, field) <= most, field, getattr(c, field), f"at most {most}")
    _expect(c.q_lora_rank is None or c.q_lora_rank > 0, "q_lora_rank", c.q_lora_rank, "positive or null")
    _expect(c.qk_rope_head_dim % 2 == 0, "qk_rope_head_dim", c.qk_rope_head_dim, "an even number")
    _expect(c.rms_norm_eps > 0, "rms_norm_eps", c.rms_norm_eps, "a positive number")
    _expect(c.rope.theta > 1, "rope_theta", c.rope.theta, "a number above 1")
    for field in ("factor", "beta_fast", "beta_slow", "original_max_position_embeddings"):
        _expect(getattr(c.rope, field) > 0, field, getattr(c.rope, field), "a positive number")
    if c.num_moe_layers:
        experts, groups = c.n_routed_experts, c.n_group
        _expect(experts % groups == 0, "n_group", groups, f"a divisor of n_routed_experts ({experts})")
        _expect(experts // groups >= 2 or groups == 1, "n_group", groups, "two or more experts a group")
        _expect(c.topk_group <= groups, "topk_group", c.topk_group, f"at most n_group ({groups})")
        reachable = experts // groups * c.topk_group
        _expect(
            c.num_experts_per_tok <= reachable,
            "num_experts_per_tok",
            c.num_experts_per_tok,
            f"at most the {reachable} experts of topk_group groups",
        )


def _integer(raw: Mapping[str, Any], field: str, default: int | None = None) -> int:
    value = raw.get(field, default)
    value = default if value is None else value
    if value is None:
        raise CmxError(f"config: {field} is missing, expected an integer")
    if isinstance(value, bool) or not isinstance(value, int):
        raise CmxError(f"config: {field} is {value!r}, expected an integer")
    return value


def _number(raw: Mapping[str, Any], field: str, default: Any) -> Any:
    value = raw.get(field)
    if value is None:
        return default
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) < 1e30:
        raise CmxError(f"config: {field} is {str(value)[:40]}, expected a finite number")
    return float(value)


def _flag(raw: Mapping[str, Any], field: str, default: bool) -> bool:
    value = raw.get(field)
    if value is None:
        return default
    if not isinstance(value, bool):
        raise CmxError(f"config: {field} is {value!r}, expected true or false")
    return value


def _rope(raw: Mapping[str, Any], max_positions: int) -> RopeConfig:
    """`rope_scaling` and `rope_theta` (transformers 4), else `rope_parameters` (transformers 5)."""
    given = raw.get("rope_scaling") or raw.get("rope_parameters") or {}
    if not isinstance(given, Mapping):
        raise CmxError(f"config: rope_parameters is {given!r}, expected an object")
    kind = given.get("rope_type", given.get("type", "default"))
    _expect(kind in ("default", "linear", "yarn"), "rope type", kind, "default, linear or yarn")
    partial = given.get("partial_rotary_factor", raw.get("partial_rotary_factor"))
    _expect(partial in (None, 1), "partial_rotary_factor", partial, "1 (all rotary dimensions turn)")
    original = _integer(given, "original_max_position_embeddings", max_positions)
    original = _integer(raw, "original_max_position_embeddings", original)
    _expect(original > 0, "original_max_position_embeddings", original, "a positive integer")
    # transformers' rule for a factor that is not given
    factor = _number(given, "factor", max_positions / original if kind == "yarn" else 1.0)
    return RopeConfig(
        theta=_number(given, "rope_theta", _number(raw, "rope_theta", 10000.0)),
        kind=kind,
        factor=factor,
        original_max_position_embeddings=original,
        attention_factor=_number(given, "attention_factor", None),
        beta_fast=_number(given, "beta_fast", None) or 32.0,
        beta_slow=_number(given, "beta_slow", None) or 1.0,
        mscale=_number(given, "mscale", None),
        mscale_all_dim=_number(given, "mscale_all_dim", None),
        truncate=_flag(given, "truncate", True),
    )


# Fields that would change the computation: value -> what is implemented.
_ONLY: dict[str, tuple[Any, ...]] = {
    "model_type": ("deepseek_v3",),
    "hidden_act": ("silu", None),
    "scoring_func": ("sigmoid", None),
    "topk_method": ("noaux_tc", None),
    "moe_layer_freq": (1, None),
    "quantization_config": (None,),
}
# What transformers' DeepseekV3Config means by an absent field (null means none).
_DEFAULTS = {
    "q_lora_rank": 1536,
    "n_shared_experts": 1,
    "n_group": 8,
    "topk_group": 4,
    "routed_scaling_factor": 2.5,
    "first_k_dense_replace": 3,
    "eos_token_id": 1,
}


def parse_config(raw: Mapping[str, Any]) -> ModelConfig:
    """A `config.json` object to a `ModelConfig`.

    Raises:
      CmxError: a field is missing, absurd, or asks for what is not implemented; the field is named.
    """
    raw = {**_DEFAULTS, **raw}
    for field, allowed in _ONLY.items():
        given = raw.get(field)
        if given not in allowed:
            raise CmxError(f"config: {field} is {given!r}, supported is {allowed[0]!r}")
    heads = _integer(raw, "num_attention_heads")
    kv_heads = _integer(raw, "num_key_value_heads", heads)
    _expect(kv_heads == heads, "num_key_value_heads", kv_heads, f"num_attention_heads ({heads})")
    eos = raw.get("eos_token_id")
    eos_ids = () if eos is None else tuple(eos) if isinstance(eos, list) else (eos,)
    _expect(all(type(i) is int for i in eos_ids), "eos_token_id", eos, "an id or a list of ids")
    max_positions = _integer(raw, "max_position_embeddings", 4096)
    return ModelConfig(
        vocab_size=_integer(raw, "vocab_size"),
        hidden_size=_integer(raw, "hidden_size"),
        intermediate_size=_integer(raw, "intermediate_size"),
        moe_intermediate_size=_integer(raw, "moe_intermediate_size"),
        num_hidden_layers=_integer(raw, "num_hidden_layers"),
        num_attention_heads=heads,
        kv_lora_rank=_integer(raw, "kv_lora_rank"),
        qk_nope_head_dim=_integer(raw, "qk_nope_head_dim"),
        qk_rope_head_dim=_integer(raw, "qk_rope_head_dim"),
        v_head_dim=_integer(raw, "v_head_dim"),
        n_routed_experts=_integer(raw, "n_routed_experts"),
        num_experts_per_tok=_integer(raw, "num_experts_per_tok"),
        q_lora_rank=None if raw.get("q_lora_rank") is None else _integer(raw, "q_lora_rank"),
        n_shared_experts=_integer(raw, "n_shared_experts", 0),
        n_group=_integer(raw, "n_group", 1),
        topk_group=_integer(raw, "topk_group", 1),
        norm_topk_prob=_flag(raw, "norm_topk_prob", True),
        routed_scaling_factor=_number(raw, "routed_scaling_factor", 1.0),
        first_k_dense_replace=_integer(raw, "first_k_dense_replace", 0),
        rms_norm_eps=_number(raw, "rms_norm_eps", 1e-6),
        rope=_rope(raw, max_positions),
        rope_interleave=_flag(raw, "rope_interleave", True),
        attention_bias=_flag(raw, "attention_bias", False),
        tie_word_embeddings=_flag(raw, "tie_word_embeddings", False),
        max_position_embeddings=max_positions,
        num_nextn_predict_layers=_integer(
            raw, "num_nextn_predict_layers", _integer(raw, "num_mtp_layers", 1)
        ),
        eos_token_ids=eos_ids,
    )


def read_config(directory: str | Path) -> ModelConfig:
    """The config of a Hugging Face directory.

    Raises:
      CmxError: no `config.json` there, not JSON, or refused by `parse_config`.
    """
    path = Path(directory) / "config.json"
    if not path.is_file():
        raise CmxError(f"{directory}: no config.json there, expected a Hugging Face model directory")
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise CmxError(f"{path}: not JSON ({error})") from None
    if not isinstance(raw, dict):
        raise CmxError(f"{path}: holds {type(raw).__name__}, expected a JSON object")
    return parse_config(raw)
