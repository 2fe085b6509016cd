"""PaLM: dense, parallel blocks, multi-query attention."""

from cmx_jax.model.config import GQAConfig, LayerKind, ModelConfig
from cmx_jax.model.families.family import Family, common, number_of_layers, rope
from cmx_jax.model.fields import Raw, integer


def _palm(raw: Raw) -> ModelConfig:
    """PaLM (arXiv 2204.02311): no checkpoint is public, so this is a shape to trace and to predict."""
    return ModelConfig(
        family="palm",
        **common(raw),
        intermediate_size=integer(raw, "intermediate_size"),
        attention=GQAConfig(
            num_key_value_heads=integer(raw, "num_key_value_heads"), head_dim=integer(raw, "head_dim")
        ),
        layers=(LayerKind(moe=False),) * number_of_layers(raw),
        block="parallel",
        norm="layer",
        rope=rope(raw, False),
    )


PALM = Family(_palm, {"rms_norm_eps": 1e-6, "max_position_embeddings": 2048})
