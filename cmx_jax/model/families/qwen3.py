"""Qwen3-MoE: grouped-query attention with QK-norm, a softmax router, no shared expert."""

from cmx_jax.model.config import GQAConfig, LayerKind, ModelConfig
from cmx_jax.model.families.family import Family, common, number_of_layers, rope
from cmx_jax.model.fields import Raw, flag, integer, integers, optional_integer
from cmx_jax.model.limits import expect


def _qwen3_moe(raw: Raw) -> ModelConfig:
    hidden, heads = integer(raw, "hidden_size"), integer(raw, "num_attention_heads")
    step, dense = integer(raw, "decoder_sparse_step"), integers(raw, "mlp_only_layers") or []
    expect(step > 0, "decoder_sparse_step", step, "a positive integer")
    experts = integer(raw, "num_experts", integer(raw, "num_local_experts", 128))
    local_experts = integer(raw, "num_local_experts", experts)
    expect(local_experts == experts, "num_local_experts", local_experts, f"num_experts ({experts})")
    expect(heads > 0, "num_attention_heads", heads, "a positive integer")
    kinds = (
        LayerKind(moe=experts > 0 and i not in dense and (i + 1) % step == 0)
        for i in range(number_of_layers(raw))
    )
    window = optional_integer(raw, "sliding_window")
    return ModelConfig(
        family="qwen3_moe",
        **common(raw),
        intermediate_size=integer(raw, "intermediate_size"),
        attention=GQAConfig(
            num_key_value_heads=integer(raw, "num_key_value_heads"),
            head_dim=integer(raw, "head_dim", hidden // heads),
            qk_norm="weighted",
            sliding_window=window if flag(raw, "use_sliding_window", False) else None,
        ),
        layers=tuple(kinds),
        moe_intermediate_size=integer(raw, "moe_intermediate_size"),
        n_routed_experts=experts,
        num_experts_per_tok=integer(raw, "num_experts_per_tok"),
        scoring="softmax",
        norm_topk_prob=flag(raw, "norm_topk_prob", False),
        rope=rope(raw, False),
    )


QWEN3_MOE = Family(
    _qwen3_moe,
    {
        "num_key_value_heads": 4,
        "sliding_window": 4096,
        "decoder_sparse_step": 1,
        "num_experts_per_tok": 8,
        "rms_norm_eps": 1e-6,
        "max_position_embeddings": 32768,
    },
)
