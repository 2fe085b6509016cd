"""Parts that families share: the description of a family, and fields with the same name in all of them."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from cmx_jax.model.config import ModelConfig, RopeConfig
from cmx_jax.model.fields import Raw, flag, integer, mapping, number, token_ids
from cmx_jax.model.limits import MAX_LAYERS, expect


@dataclass(frozen=True)
class Family:
    """One `model_type`.

    Attributes:
      read: Converts a `config.json`, with the defaults filled in.
      defaults: Values of absent fields, as in the family's own configuration class.
      only: Implemented values of fields that would change the computation.
      renamed: Today's name of a field, by former name.
    """

    read: Callable[[Raw], ModelConfig]
    defaults: Raw
    only: dict[str, tuple[Any, ...]] = field(default_factory=dict)
    renamed: dict[str, str] = field(default_factory=dict)


ROPE_KINDS = ("default", "linear", "yarn", "llama3")
_NEEDED = {"linear": ("factor",), "llama3": ("factor", "low_freq_factor", "high_freq_factor")}


def rope(raw: Raw, interleaved: bool) -> RopeConfig:
    """Reads `rope_scaling` and `rope_theta` (transformers 4), else `rope_parameters` (transformers 5)."""
    fields = mapping(raw, "rope_scaling") or mapping(raw, "rope_parameters")
    kind = fields.get("rope_type", fields.get("type", "default"))
    expect(kind in ROPE_KINDS, "rope type", str(kind)[:40], f"one of {', '.join(ROPE_KINDS)}")
    for name in _NEEDED.get(kind, ()):
        expect(fields.get(name) is not None, f"rope {name}", None, f"a number, for rope type {kind}")
    nested = [name for name, value in fields.items() if isinstance(value, Mapping)]
    expect(not nested, "rope_parameters", f"by kind of layer ({nested})", "one set for all layers")
    partial = fields.get("partial_rotary_factor", raw.get("partial_rotary_factor"))
    expect(partial in (None, 1), "partial_rotary_factor", partial, "1 (all rotary dimensions turn)")
    positions = integer(raw, "max_position_embeddings")
    original = integer(fields, "original_max_position_embeddings", positions)
    original = integer(raw, "original_max_position_embeddings", original)
    expect(original > 0, "original_max_position_embeddings", original, "a positive integer")
    # transformers' rule for an absent factor
    factor = number(fields, "factor", positions / original if kind == "yarn" else 1.0)
    return RopeConfig(
        theta=number(fields, "rope_theta", number(raw, "rope_theta", 10000.0)),
        interleaved=interleaved,
        kind=kind,
        factor=factor,
        original_max_position_embeddings=original,
        attention_factor=number(fields, "attention_factor", None),
        beta_fast=number(fields, "beta_fast", None) or 32.0,
        beta_slow=number(fields, "beta_slow", None) or 1.0,
        mscale=number(fields, "mscale", None),
        mscale_all_dim=number(fields, "mscale_all_dim", None),
        truncate=flag(fields, "truncate", True),
        low_freq_factor=number(fields, "low_freq_factor", 1.0),
        high_freq_factor=number(fields, "high_freq_factor", 4.0),
    )


def common(raw: Raw) -> dict[str, Any]:
    """Fields with the same name in every family."""
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


def number_of_layers(raw: Raw) -> int:
    """Number of layers, checked before anything of that size is made."""
    layers = integer(raw, "num_hidden_layers")
    expect(0 < layers <= MAX_LAYERS, "num_hidden_layers", layers, f"1 to {MAX_LAYERS}")
    return layers
