"""Families of models: the conversion of each family's `config.json` to a `ModelConfig`, one file per family.

Both styles of transformers, 4 (`rope_scaling`) and 5 (`rope_parameters`), are read. An absent field has the
default of the family's own code. A field that would be computed wrongly is refused by name, never ignored.
"""

from dataclasses import replace
from importlib.resources import files
from pathlib import Path
from typing import Any

from cmx_jax.errors import CmxError
from cmx_jax.model.config import ModelConfig
from cmx_jax.model.families.deepseek import DEEPSEEK_V3, MINDIE_DEEPSEEK, PANGU_ULTRA_MOE
from cmx_jax.model.families.llama4 import LLAMA4
from cmx_jax.model.families.palm import PALM
from cmx_jax.model.families.qwen3 import QWEN3_MOE
from cmx_jax.model.fields import Raw, mapping, only, read_json, token_ids
from cmx_jax.model.limits import expect

FAMILIES = {
    "deepseek_v3": DEEPSEEK_V3,
    "deepseekv2": MINDIE_DEEPSEEK,
    "kimi_k2": DEEPSEEK_V3,
    "pangu_ultra_moe": PANGU_ULTRA_MOE,
    "qwen3_moe": QWEN3_MOE,
    "llama4_text": LLAMA4,
    "llama4": LLAMA4,
    "palm": PALM,
}
"""Families by `model_type`."""


def parse_config(raw: Raw) -> ModelConfig:
    """Converts a `config.json` object to a `ModelConfig`.

    Raises:
      CmxError: A field is missing, absurd or not implemented; the field is named.
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
    """Reads the config of a Hugging Face directory; a `generation_config.json` replaces its end tokens.

    Raises:
      CmxError: There is no `config.json`, it is not JSON, or `parse_config` refuses it.
    """
    config = parse_config(read_json(Path(directory) / "config.json"))
    generation = Path(directory) / "generation_config.json"
    ids = token_ids(read_json(generation), "eos_token_id") if generation.is_file() else ()
    return replace(config, eos_token_ids=ids) if ids else config


def presets() -> dict[str, Path]:
    """Files with the public `config.json` of full-size models, by name; there are no weights."""
    folder = Path(str(files("cmx_jax") / "model" / "presets"))
    return {path.stem: path for path in sorted(folder.glob("*.json"))}


def preset(name: str) -> ModelConfig:
    """The config of a full-size model, to count, trace and predict.

    Raises:
      CmxError: The name is unknown.
    """
    known = presets()
    if name not in known:
        raise CmxError(f"preset {name!r} is unknown, expected one of {', '.join(known)}")
    return parse_config(read_json(known[name]))
