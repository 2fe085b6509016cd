"""Families of models: how each one's `config.json` becomes a `ModelConfig`, a file for each.

Both styles of transformers, 4 (`rope_scaling`) and 5 (`rope_parameters`), are read. What an absent field
means is what the family's own code takes it for. What would be computed wrongly is refused by name, never
ignored.
"""

from dataclasses import replace
from importlib.resources import files
from pathlib import Path
from typing import Any

from cmx_jax.errors import CmxError
from cmx_jax.model.config import ModelConfig, expect
from cmx_jax.model.families.deepseek import DEEPSEEK_V3, PANGU_ULTRA_MOE
from cmx_jax.model.families.llama4 import LLAMA4
from cmx_jax.model.families.palm import PALM
from cmx_jax.model.families.qwen3 import QWEN3_MOE
from cmx_jax.model.fields import Raw, mapping, only, read_json, token_ids

FAMILIES = {
    "deepseek_v3": DEEPSEEK_V3,
    "pangu_ultra_moe": PANGU_ULTRA_MOE,
    "qwen3_moe": QWEN3_MOE,
    "llama4_text": LLAMA4,
    "llama4": LLAMA4,
    "palm": PALM,
}
"""By `model_type`."""


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
        same = FAMILIES.get(str(text["model_type"])) is FAMILIES[name]
        expect(same, "text_config.model_type", text["model_type"], f"that of {name}")
        raw = text  # the outer fields are not the text model's, tie_word_embeddings included
    family = FAMILIES[name]
    only(raw, {"hidden_act": ("silu", "swish"), **family.only})
    named: dict[str, Any] = {}
    for key, value in raw.items():
        field = family.renamed.get(key, key)
        expect(named.get(field, value) == value, key, value, f"what {field} says ({named.get(field)!r})")
        named[field] = value
    return family.read({**family.defaults, **named})


def read_config(directory: str | Path) -> ModelConfig:
    """The config of a Hugging Face directory; end tokens are those of its `generation_config.json`, if any.

    Raises:
      CmxError: no `config.json` there, not JSON, or refused by `parse_config`.
    """
    config = parse_config(read_json(Path(directory) / "config.json"))
    generation = Path(directory) / "generation_config.json"
    ids = token_ids(read_json(generation), "eos_token_id") if generation.is_file() else ()
    return replace(config, eos_token_ids=ids) if ids else config


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
