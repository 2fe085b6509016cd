"""DeepSeek-V3 and R1, Kimi-K2 of the same architecture, and Pangu Ultra MoE with other norms and router."""

from dataclasses import replace
from typing import Any

from cmx_jax.model.config import LayerKind, MLAConfig, ModelConfig
from cmx_jax.model.families.family import Family, common, number_of_layers, rope
from cmx_jax.model.fields import Raw, flag, integer, number, optional_integer
from cmx_jax.model.limits import expect


def _leading_dense(raw: Raw, name: str) -> tuple[LayerKind, ...]:
    dense = integer(raw, name, 0)
    expect(dense >= 0, name, dense, "zero or more")
    return tuple(LayerKind(moe=i >= dense) for i in range(number_of_layers(raw)))


def _deepseek(raw: Raw, **family: Any) -> ModelConfig:
    """Fields that DeepSeek-V3 and Pangu Ultra MoE have in common."""
    heads = integer(raw, "num_attention_heads")
    kv_heads = integer(raw, "num_key_value_heads", heads)
    expect(kv_heads == heads, "num_key_value_heads", kv_heads, f"num_attention_heads ({heads})")
    return ModelConfig(
        **common(raw),
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
        rope=rope(raw, flag(raw, "rope_interleave", True)),
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
        latent_norm_eps=1e-6,  # independent of rms_norm_eps, as in DeepSeek's and transformers' code
    )


def _mindie(raw: Raw) -> ModelConfig:
    """MindIE's `model_type` of all DeepSeek models: V3 and R1 are told from V2 by their router."""
    scoring = raw.get("scoring_func")
    expect(scoring == "sigmoid", "scoring_func", scoring, "sigmoid (DeepSeek-V3's router)")
    return _deepseek_v3(raw)


def _pangu_ultra_moe(raw: Raw) -> ModelConfig:
    """Sandwich norms, no groups, no correction bias (openPangu-Ultra-MoE-718B)."""
    return _deepseek(
        raw,
        family="pangu_ultra_moe",
        block="sandwich" if flag(raw, "sandwich_norm", False) else "pre",
        latent_norm_eps=number(raw, "rms_norm_eps", 1e-6),
    )


DEEPSEEK_V3 = Family(
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
MINDIE_DEEPSEEK = replace(DEEPSEEK_V3, read=_mindie)
PANGU_ULTRA_MOE = Family(
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
    # refuses Pangu 2.0, which has the same model_type
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
