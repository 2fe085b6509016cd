"""Families of models: how each one's `config.json` becomes a `ModelConfig`.

Both styles of transformers, 4 (`rope_scaling`) and 5 (`rope_parameters`), are read. What an absent field
means is what the family's own code takes it for. What would be computed wrongly is refused by name, never
ignored.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path
from typing import Any

from cmx_jax.errors import CmxError
from cmx_jax.model.config import GQAConfig, LayerKind, MLAConfig, ModelConfig, RopeConfig, expect
from cmx_jax.model.fields import (
    Raw,
    flag,
    integer,
    integers,
    mapping,
    number,
    only,
    optional_integer,
    token_ids,
)

MAX_LAYERS = 10_000


def _rope(raw: Raw, interleaved: bool, kinds: tuple[str, ...] = ("default", "linear", "yarn")) -> RopeConfig:
    """`rope_scaling` and `rope_theta` (transformers 4), else `rope_parameters` (transformers 5)."""
    given = mapping(raw, "rope_scaling") or mapping(raw, "rope_parameters")
    kind = given.get("rope_type", given.get("type", "default"))
    expect(kind in kinds, "rope type", kind, f"one of {', '.join(kinds)}")
    partial = given.get("partial_rotary_factor", raw.get("partial_rotary_factor"))
    expect(partial in (None, 1), "partial_rotary_factor", partial, "1 (all rotary dimensions turn)")
    positions = integer(raw, "max_position_embeddings")
    original = integer(given, "original_max_position_embeddings", positions)
    original = integer(raw, "original_max_position_embeddings", original)
    expect(original > 0, "original_max_position_embeddings", original, "a positive integer")
    # transformers' rule for a factor that is not given
    factor = number(given, "factor", positions / original if kind == "yarn" else 1.0)
    return RopeConfig(
        theta=number(given, "rope_theta", number(raw, "rope_theta", 10000.0)),
        interleaved=interleaved,
        kind=kind,
        factor=factor,
        original_max_position_embeddings=original,
        attention_factor=number(given, "attention_factor", None),
        beta_fast=number(given, "beta_fast", None) or 32.0,
        beta_slow=number(given, "beta_slow", None) or 1.0,
        mscale=number(given, "mscale", None),
        mscale_all_dim=number(given, "mscale_all_dim", None),
        truncate=flag(given, "truncate", True),
        low_freq_factor=number(given, "low_freq_factor", 1.0),
        high_freq_factor=number(given, "high_freq_factor", 4.0),
    )


def _common(raw: Raw) -> dict[str, Any]:
    """What every family calls by the same name."""
    return {
        "vocab_size": integer(raw, "vocab_size"),
        "hidden_size": integer(raw, "hidden_size"),
        "num_attention_heads": integer(raw, "num_attention_heads"),
        "rms_norm_eps": number(raw, "rms_norm_eps", 1e-6),
        "tie_word_embeddings": flag(raw, "tie_word_embeddings", False),
        "attention_bias": flag(raw, "attention_bias", False),
        "max_position_embeddings": integer(raw, "max_position_embeddings"),
        "eos_token_ids": token_ids(raw, "eos_token_id"),
    }


def _layers(raw: Raw) -> int:
    layers = integer(raw, "num_hidden_layers")
    expect(0 < layers <= MAX_LAYERS, "num_hidden_layers", layers, f"1 to {MAX_LAYERS}")
    return layers


def _leading_dense(raw: Raw, name: str) -> tuple[LayerKind, ...]:
    dense = integer(raw, name, 0)
    expect(dense >= 0, name, dense, "zero or more")
    return tuple(LayerKind(moe=i >= dense) for i in range(_layers(raw)))


def _deepseek(raw: Raw, **family: Any) -> ModelConfig:
    """What DeepSeek-V3 and Pangu Ultra MoE have in common."""
    heads = integer(raw, "num_attention_heads")
    kv_heads = integer(raw, "num_key_value_heads", heads)
    expect(kv_heads == heads, "num_key_value_heads", kv_heads, f"num_attention_heads ({heads})")
    return ModelConfig(
        **_common(raw),
        intermediate_size=integer(raw, "intermediate_size"),
        attention=MLAConfig(
            kv_lora_rank=integer(raw, "kv_lora_rank"),
            qk_nope_head_dim=integer(raw, "qk_nope_head_dim"),
            qk_rope_head_dim=integer(raw, "qk_rope_head_dim"),
            v_head_dim=integer(raw, "v_head_dim"),
            q_lora_rank=optional_integer(raw, "q_lora_rank"),
            latent_norm_eps=family.pop("latent_norm_eps"),
        ),
        layers=_leading_dense(raw, "first_k_dense_replace"),
        moe_intermediate_size=integer(raw, "moe_intermediate_size"),
        n_routed_experts=integer(raw, "n_routed_experts"),
        num_experts_per_tok=integer(raw, "num_experts_per_tok"),
        n_shared_experts=integer(raw, "n_shared_experts", 0),
        norm_topk_prob=flag(raw, "norm_topk_prob", True),
        routed_scaling_factor=number(raw, "routed_scaling_factor", 1.0),
        rope=_rope(raw, flag(raw, "rope_interleave", True)),
        num_nextn_predict_layers=integer(raw, "num_nextn_predict_layers", 1),
        **family,
    )


def _deepseek_v3(raw: Raw) -> ModelConfig:
    return _deepseek(
        raw,
        family="deepseek_v3",
        n_group=integer(raw, "n_group", 1),
        topk_group=integer(raw, "topk_group", 1),
        router_bias=True,
        latent_norm_eps=1e-6,  # whatever rms_norm_eps says, as in DeepSeek's and transformers' code
    )


def _pangu_ultra_moe(raw: Raw) -> ModelConfig:
    """Sandwich norms, no groups, no correction bias (openPangu-Ultra-MoE-718B)."""
    return _deepseek(
        raw,
        family="pangu_ultra_moe",
        block="sandwich" if flag(raw, "sandwich_norm", False) else "pre",
        latent_norm_eps=number(raw, "rms_norm_eps", 1e-6),
    )


def _qwen3_moe(raw: Raw) -> ModelConfig:
    hidden, heads = integer(raw, "hidden_size"), integer(raw, "num_attention_heads")
    step, dense = integer(raw, "decoder_sparse_step"), integers(raw, "mlp_only_layers") or []
    expect(step > 0, "decoder_sparse_step", step, "a positive integer")
    experts = integer(raw, "num_experts", integer(raw, "num_local_experts", 128))
    both = integer(raw, "num_local_experts", experts)
    expect(both == experts, "num_local_experts", both, f"num_experts ({experts})")
    expect(heads > 0, "num_attention_heads", heads, "a positive integer")
    kinds = (
        LayerKind(moe=experts > 0 and i not in dense and (i + 1) % step == 0) for i in range(_layers(raw))
    )
    return ModelConfig(
        family="qwen3_moe",
        **_common(raw),
        intermediate_size=integer(raw, "intermediate_size"),
        attention=GQAConfig(
            num_key_value_heads=integer(raw, "num_key_value_heads"),
            head_dim=integer(raw, "head_dim", hidden // heads),
            qk_norm="weighted",
            sliding_window=integer(raw, "sliding_window", 4096)
            if flag(raw, "use_sliding_window", False)
            else None,
        ),
        layers=tuple(kinds),
        moe_intermediate_size=integer(raw, "moe_intermediate_size"),
        n_routed_experts=experts,
        num_experts_per_tok=integer(raw, "num_experts_per_tok"),
        scoring="softmax",
        norm_topk_prob=flag(raw, "norm_topk_prob", False),
        rope=_rope(raw, False, ("default", "linear", "yarn", "llama3")),
    )


def _llama4(raw: Raw) -> ModelConfig:
    """Llama 4's text model; of a multimodal directory the `text_config`."""
    layers, hidden, heads = _layers(raw), integer(raw, "hidden_size"), integer(raw, "num_attention_heads")
    expect(heads > 0, "num_attention_heads", heads, "a positive integer")
    step, interval = integer(raw, "interleave_moe_layer_step"), integer(raw, "no_rope_layer_interval")
    for name, value in (("interleave_moe_layer_step", step), ("no_rope_layer_interval", interval)):
        expect(value > 0, name, value, "a positive integer")
    moe = integers(raw, "moe_layers")
    moe = list(range(step - 1, layers, step)) if moe is None else moe
    rope = integers(raw, "no_rope_layers") or [(i + 1) % interval for i in range(layers)]
    types = raw.get("layer_types") or ["chunked_attention" if turns else "full_attention" for turns in rope]
    known = isinstance(types, list) and all(t in ("chunked_attention", "full_attention") for t in types)
    expect(known, "layer_types", str(types)[:80], "a list of chunked_attention and full_attention")
    for name, given in (("no_rope_layers", rope), ("layer_types", types)):
        expect(len(given) >= layers, name, f"{len(given)} long", f"one entry for each of {layers} layers")
    chunk = optional_integer(raw, "attention_chunk_size")
    chunked = [chunk is not None and t == "chunked_attention" for t in types]
    tuned = raw.get("attn_temperature_tuning") in (None, True, 4)  # released configs say 4 and mean true
    if not tuned:
        flag(raw, "attn_temperature_tuning", False)
    return ModelConfig(
        family="llama4",
        **_common(raw),
        intermediate_size=integer(raw, "intermediate_size_mlp"),
        attention=GQAConfig(
            num_key_value_heads=integer(raw, "num_key_value_heads", heads),
            head_dim=integer(raw, "head_dim", hidden // heads),
            qk_norm="l2" if flag(raw, "use_qk_norm", True) else "none",
            chunk_size=chunk,
            temperature_scale=number(raw, "attn_scale", 0.1) if tuned else 0.0,
            temperature_floor=integer(raw, "floor_scale", 8192),
        ),
        layers=tuple(LayerKind(i in moe, rope[i] != 0, chunked[i]) for i in range(layers)),
        moe_intermediate_size=integer(raw, "intermediate_size"),
        n_routed_experts=integer(raw, "num_local_experts"),
        num_experts_per_tok=integer(raw, "num_experts_per_tok"),
        n_shared_experts=1,
        norm_topk_prob=False,
        weigh_input=True,
        rope=_rope(raw, True, ("default", "linear", "yarn", "llama3")),
    )


def _palm(raw: Raw) -> ModelConfig:
    """PaLM (arXiv 2204.02311): no checkpoint is public, so this is a shape to trace and to predict."""
    return ModelConfig(
        family="palm",
        **_common(raw),
        intermediate_size=integer(raw, "intermediate_size"),
        attention=GQAConfig(
            num_key_value_heads=integer(raw, "num_key_value_heads"), head_dim=integer(raw, "head_dim")
        ),
        layers=(LayerKind(moe=False),) * _layers(raw),
        block="parallel",
        norm="layer",
        rope=_rope(raw, False),
    )


@dataclass(frozen=True)
class Family:
    """One `model_type`.

    Attributes:
      read: from a `config.json` with the defaults filled in.
      defaults: what absent fields mean, as in the family's own configuration class.
      only: fields that would change the computation -> what is implemented.
      renamed: other names that a field has had.
    """

    read: Callable[[Raw], ModelConfig]
    defaults: Raw
    only: dict[str, tuple[Any, ...]] = field(default_factory=dict)
    renamed: dict[str, str] = field(default_factory=dict)


_DEEPSEEK_V3 = Family(
    _deepseek_v3,
    {
        "q_lora_rank": 1536,
        "n_shared_experts": 1,
        "n_group": 8,
        "topk_group": 4,
        "routed_scaling_factor": 2.5,
        "first_k_dense_replace": 3,
        "rms_norm_eps": 1e-6,
        "max_position_embeddings": 4096,
        "eos_token_id": 1,
    },
    {"scoring_func": ("sigmoid",), "topk_method": ("noaux_tc",), "moe_layer_freq": (1,)},
    {"num_mtp_layers": "num_nextn_predict_layers"},
)
_PANGU_ULTRA_MOE = Family(
    _pangu_ultra_moe,
    {
        "q_lora_rank": 1536,
        "n_shared_experts": 1,
        "routed_scaling_factor": 2.5,
        "first_k_dense_replace": 3,
        "rms_norm_eps": 1e-5,
        "rope_theta": 25600000.0,
        "max_position_embeddings": 131072,
        "eos_token_id": 1,
    },
    # of Pangu 2.0, which shares the model_type
    {
        "scoring_func": ("sigmoid",),
        "n_group": (1,),
        "topk_group": (1,),
        "moe_layer_freq": (1,),
        "router_enable_expert_bias": (False,),
        "param_sink_number": (0,),
        "use_mhc": (False,),
        "use_mome": (False,),
        "index_topk": (0,),
        "sliding_window": (0,),
        "sliding_window_list": ([],),
        "dsa_layers": ([],),
        "swa_layers": ([],),
        "block_post_layernorm_idx": ([],),
    },
    {
        "attention_q_lora_dim": "q_lora_rank",
        "attention_kv_lora_dim": "kv_lora_rank",
        "attention_qk_dim": "qk_nope_head_dim",
        "attention_qk_rope_dim": "qk_rope_head_dim",
        "attention_v_dim": "v_head_dim",
        "num_routed_experts": "n_routed_experts",
        "num_shared_experts": "n_shared_experts",
        "num_dense_layers": "first_k_dense_replace",
        "num_mtp_layers": "num_nextn_predict_layers",
    },
)
_LLAMA4 = Family(
    _llama4,
    {
        "intermediate_size_mlp": 16384,
        "head_dim": 128,
        "num_key_value_heads": 8,
        "num_experts_per_tok": 1,
        "num_local_experts": 16,
        "interleave_moe_layer_step": 1,
        "no_rope_layer_interval": 4,
        "attention_chunk_size": 8192,
        "rms_norm_eps": 1e-5,
        "rope_theta": 500000.0,
        "max_position_embeddings": 4096 * 32,
        "eos_token_id": 2,
    },
)
FAMILIES = {
    "deepseek_v3": _DEEPSEEK_V3,
    "pangu_ultra_moe": _PANGU_ULTRA_MOE,
    "qwen3_moe": Family(
        _qwen3_moe,
        {
            "num_key_value_heads": 4,
            "decoder_sparse_step": 1,
            "num_experts_per_tok": 8,
            "rms_norm_eps": 1e-6,
            "max_position_embeddings": 32768,
        },
    ),
    "llama4_text": _LLAMA4,
    "llama4": _LLAMA4,
    "palm": Family(_palm, {"rms_norm_eps": 1e-6, "max_position_embeddings": 2048}),
}


def parse_config(raw: Raw) -> ModelConfig:
    """A `config.json` object to a `ModelConfig`.

    Raises:
      CmxError: a field is missing, absurd, or asks for what is not implemented; the field is named.
    """
    name = raw.get("model_type")
    if not isinstance(name, str) or name not in FAMILIES:
        raise CmxError(
            f"config: model_type is {str(name)[:40]!r}, supported are {', '.join(sorted(FAMILIES))}"
        )
    if "text_config" in raw:
        text = {"model_type": name, **mapping(raw, "text_config")}
        expect(text["model_type"] in FAMILIES, "text_config.model_type", text["model_type"], name)
        raw = {"tie_word_embeddings": raw.get("tie_word_embeddings"), **text}
    family = FAMILIES[name]
    only(raw, {"hidden_act": ("silu", "swish"), **family.only})
    named = {family.renamed.get(key, key): value for key, value in raw.items()}
    return family.read({**family.defaults, **named})


def read_config(directory: str | Path) -> ModelConfig:
    """The config of a Hugging Face directory.

    Raises:
      CmxError: no `config.json` there, not JSON, or refused by `parse_config`.
    """
    return parse_config(read_json(Path(directory) / "config.json"))


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object of a model's directory.

    Raises:
      CmxError: it is not there, cannot be read, or is no JSON object.
    """
    if not path.is_file():
        raise CmxError(f"{path.parent}: no {path.name} there, expected a Hugging Face model directory")
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise CmxError(f"{path}: not JSON ({error})") from None
    except OSError as error:
        raise CmxError(f"{path}: cannot be read ({error.strerror})") from None
    if not isinstance(raw, dict):
        raise CmxError(f"{path}: holds {type(raw).__name__}, expected a JSON object")
    return raw


def presets() -> dict[str, Path]:
    """Full-size models by name: the file with their public `config.json`; no weights."""
    folder = Path(str(files("cmx_jax") / "model" / "presets"))
    return {path.stem: path for path in sorted(folder.glob("*.json"))}


def preset(name: str) -> ModelConfig:
    """The config of a full-size model, to count, trace and predict.

    Raises:
      CmxError: there is none of that name.
    """
    known = presets()
    if name not in known:
        raise CmxError(f"preset {name!r} is unknown, expected one of {', '.join(known)}")
    return parse_config(read_json(known[name]))
