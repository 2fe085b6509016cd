"""Llama 4: chunked attention, layers without rotation, experts weighted by input."""

from cmx_jax.model.config import GQAConfig, LayerKind, ModelConfig
from cmx_jax.model.families.family import Family, common, number_of_layers, rope
from cmx_jax.model.fields import Raw, flag, integer, integers, number, optional_integer
from cmx_jax.model.limits import expect


def _llama4(raw: Raw) -> ModelConfig:
    """Llama 4's text model; in a multimodal directory it is the `text_config`."""
    layers, hidden, heads = (
        number_of_layers(raw),
        integer(raw, "hidden_size"),
        integer(raw, "num_attention_heads"),
    )
    expect(heads > 0, "num_attention_heads", heads, "a positive integer")
    step, interval = integer(raw, "interleave_moe_layer_step"), integer(raw, "no_rope_layer_interval")
    for name, value in (("interleave_moe_layer_step", step), ("no_rope_layer_interval", interval)):
        expect(value > 0, name, value, "a positive integer")
    moe = integers(raw, "moe_layers")
    moe = list(range(step - 1, layers, step)) if moe is None else moe
    turning = integers(raw, "no_rope_layers") or [(i + 1) % interval for i in range(layers)]
    types = raw.get("layer_types") or [
        "chunked_attention" if turns else "full_attention" for turns in turning
    ]
    known = isinstance(types, list) and all(t in ("chunked_attention", "full_attention") for t in types)
    expect(known, "layer_types", str(types)[:80], "a list of chunked_attention and full_attention")
    for name, entries in (("no_rope_layers", turning), ("layer_types", types)):
        expect(len(entries) >= layers, name, f"{len(entries)} long", f"one entry for each of {layers} layers")
    chunk = optional_integer(raw, "attention_chunk_size")
    chunked = [chunk is not None and t == "chunked_attention" for t in types]
    tuning = "attn_temperature_tuning"
    tuned = raw.get(tuning) == 4 or flag(raw, tuning, True)  # released configs say 4 and mean true
    return ModelConfig(
        family="llama4",
        **common(raw),
        intermediate_size=integer(raw, "intermediate_size_mlp"),
        attention=GQAConfig(
            num_key_value_heads=integer(raw, "num_key_value_heads", heads),
            head_dim=integer(raw, "head_dim", hidden // heads),
            qk_norm="l2" if flag(raw, "use_qk_norm", True) else "none",
            chunk_size=chunk,
            temperature_scale=number(raw, "attn_scale", 0.1) if tuned else 0.0,
            temperature_floor=integer(raw, "floor_scale", 8192),
        ),
        layers=tuple(LayerKind(i in moe, turning[i] != 0, chunked[i]) for i in range(layers)),
        moe_intermediate_size=integer(raw, "intermediate_size"),
        n_routed_experts=integer(raw, "num_local_experts"),
        num_experts_per_tok=integer(raw, "num_experts_per_tok"),
        n_shared_experts=1,
        norm_topk_prob=False,
        weigh_input=True,
        rope=rope(raw, True),
    )


LLAMA4 = Family(
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
