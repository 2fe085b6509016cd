"""Quantisation that a checkpoint announces, by `quantization_config` or by Ascend's description file."""

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

from cmx_jax.errors import CmxError
from cmx_jax.model.fields import mapping, read_json

DESCRIPTION = "quant_model_description.json"
DESCRIPTIONS = "quant_model_description*.json"
"""Pattern of the names of Ascend's description: msModelSlim adds the kind, as in `..._w8a8_dynamic.json`."""
ASCEND_KINDS = ("w8a8", "w8a8_dynamic")  # of MindIE's field `quantize`
# Sensitive and small modules, which stay in floats (section 4.5), as in compressed-tensors' `ignore`.
IGNORED = ("lm_head", r"re:.*\.(gate|router)$")


@dataclass(frozen=True)
class Declared:
    """Quantisation announced by `config.json` and the Ascend description.

    Attributes:
      method: `quant_method`, `ascend`, or None.
      block: Rows and columns of the block that a scale is for.
      strategies: Strategies of compressed-tensors: some of `channel`, `tensor`, `group` and `block`.
      types: Types that quantised weights may have, by their names in safetensors.
      group: Number of numbers in a row that share a scale; None without groups.
      ignored: Modules that compressed-tensors left in floats: full names, and patterns.
      ascend: FLOAT, W8A8 or W8A8_DYNAMIC, by name of the tensor.
      w8a8: True if activations are to be rounded to INT8 too, with a dynamic scale for each token.
    """

    method: str | None = None
    block: tuple[int, int] = (128, 128)
    strategies: frozenset[str] = frozenset({"channel"})
    types: frozenset[str] = frozenset({"I8"})
    group: int | None = None
    ignored: tuple[frozenset[str], tuple[re.Pattern[str], ...]] = (frozenset(), ())
    ascend: Mapping[str, str] = field(default_factory=dict)
    w8a8: bool = False

    def ignores(self, name: str) -> bool:
        """Returns whether the tensor's module was left in floats."""
        module = name.removesuffix(".weight")
        return module in self.ignored[0] or any(pattern.match(module) for pattern in self.ignored[1])


def _refuse(name: str, value: object, expected: str) -> NoReturn:
    raise CmxError(f"config: quantization_config.{name} is {str(value)[:60]!r}, expected {expected}")


def _block(raw: Mapping[str, Any]) -> tuple[int, int]:
    block: Any = raw.get("weight_block_size")
    if not _is_block(block):
        _refuse("weight_block_size", block, "two positive integers")
    return block[0], block[1]


def _is_block(value: object) -> bool:
    return isinstance(value, list) and len(value) == 2 and all(type(n) is int and n > 0 for n in value)


def _compressed(raw: Mapping[str, Any]) -> Declared:
    formats = ("int-quantized", "float-quantized", "naive-quantized", None)
    if raw.get("format") not in formats:
        _refuse("format", raw.get("format"), "int-quantized or float-quantized")
    if raw.get("transform_config"):
        _refuse("transform_config", raw["transform_config"], "none: rotations while running are not applied")
    sparsity = raw.get("sparsity_config")
    if sparsity and (not isinstance(sparsity, Mapping) or sparsity.get("format") not in ("dense", None)):
        _refuse("sparsity_config", sparsity, "none, or format dense")
    groups = raw.get("config_groups")
    if not isinstance(groups, Mapping) or not groups:
        _refuse("config_groups", groups, "an object with a group")
    weights = {
        name: _compressed_weights(
            f"config_groups.{name}.weights", config.get("weights") if isinstance(config, Mapping) else None
        )
        for name, config in groups.items()
    }
    sizes = {w["group_size"] for w in weights.values() if w["strategy"] == "group"}
    if len(sizes) > 1:
        _refuse("config_groups", sizes, "one group_size")
    blocks = {tuple(w["block_structure"]) for w in weights.values() if w["strategy"] == "block"}
    if len(blocks) > 1:
        _refuse("config_groups", blocks, "one block_structure")
    return Declared(
        "compressed-tensors",
        block=next(iter(blocks), Declared.block),
        strategies=frozenset(w["strategy"] for w in weights.values()),
        types=frozenset("F8_E4M3" if w.get("type") == "float" else "I8" for w in weights.values()),
        group=next(iter(sizes), None),
        ignored=_ignored(raw.get("ignore")),
        w8a8=all(_by_token(group.get("input_activations")) for group in groups.values()),
    )


def _by_token(activations: Any) -> bool:
    """Returns whether activations are INT8 with a dynamic scale for each token."""
    expected = {"num_bits": 8, "type": "int", "strategy": "token", "dynamic": True}
    return isinstance(activations, Mapping) and all(activations.get(key) == x for key, x in expected.items())


def _compressed_weights(name: str, weights: Any) -> Mapping[str, Any]:
    """Arguments of a group's weights, checked; `name` is for errors."""
    if not isinstance(weights, Mapping):
        _refuse(name, weights, "an object")
    expected: dict[str, tuple[Any, ...]] = {
        "num_bits": (8, None),
        "symmetric": (True, None),
        "strategy": ("channel", "tensor", "group", "block"),
        "type": ("int", "float", None),
    }
    for key, values in expected.items():
        if weights.get(key) not in values:
            _refuse(f"{name}.{key}", weights.get(key), f"{values[0]}")
    size = weights.get("group_size")
    if weights["strategy"] == "group" and (type(size) is not int or size < 1):
        _refuse(f"{name}.group_size", size, "a positive integer")
    block = weights.get("block_structure")
    if weights["strategy"] == "block" and not _is_block(block):
        _refuse(f"{name}.block_structure", block, "two positive integers")
    return weights


def _ignored(value: Any) -> tuple[frozenset[str], tuple[re.Pattern[str], ...]]:
    """Names and patterns of `ignore`, in which patterns have the prefix `re:`."""
    names = [] if value is None else value
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        _refuse("ignore", value, "a list of module names")
    patterns = []
    for name in names:
        if name.startswith("re:"):
            try:
                patterns.append(re.compile(name[3:]))
            except re.error as error:
                _refuse("ignore", name, f"a pattern ({error})")
    return frozenset(name for name in names if not name.startswith("re:")), tuple(patterns)


def _fp8(raw: Mapping[str, Any]) -> Declared:
    if raw.get("fmt", "e4m3") != "e4m3":
        _refuse("fmt", raw.get("fmt"), "e4m3")
    return Declared("fp8", _block(raw), types=frozenset({"F8_E4M3"}))


METHODS: dict[str, Callable[[Mapping[str, Any]], Declared]] = {
    "fp8": _fp8,
    "compressed-tensors": _compressed,
    "blockwise_int8": lambda raw: Declared("blockwise_int8", _block(raw)),
    "w8a8_int8": lambda raw: Declared("w8a8_int8", w8a8=True),
    "ascend": lambda raw: Declared("ascend"),
}


def declared(raw: Mapping[str, Any], directory: Path) -> Declared:
    """Reads the quantisation that a directory announces.

    Args:
      raw: Parsed `config.json`.
      directory: Directory of the checkpoint.

    Raises:
      CmxError: A method, width or kind is not supported; the field is named.
    """
    fields = ("quantization_config", "compression_config")
    text = raw.get("text_config")
    if isinstance(text, Mapping) and all(raw.get(name) is None for name in fields):
        raw = text  # of a multimodal model, whose other parts are not read
    field = next((name for name in fields if raw.get(name) is not None), fields[0])
    config = mapping(raw, field)
    announced = Declared()
    if (kind := raw.get("quantize")) is not None and config.get("quant_method") is None:
        if kind not in ASCEND_KINDS:
            raise CmxError(f"config: quantize is {str(kind)[:60]!r}, expected {' or '.join(ASCEND_KINDS)}")
        announced = Declared("ascend")
    elif raw.get(field) is not None:
        method = config.get("quant_method")
        if not isinstance(method, str) or method not in METHODS:
            _refuse("quant_method", method, f"one of {', '.join(METHODS)}")
        announced = METHODS[method](config)
    descriptions = sorted(directory.glob(DESCRIPTIONS))
    if len(descriptions) > 1:
        raise CmxError(f"{directory}: has {', '.join(path.name for path in descriptions)}: which is meant?")
    if descriptions:  # an FP8 model's quantization_config may still be there
        return Declared("ascend", ascend=_description(descriptions[0]))
    if announced.method == "ascend":
        raise CmxError(f"{directory}: quant_method is ascend, but there is no {DESCRIPTION}")
    return announced


def _description(path: Path) -> dict[str, str]:
    """Kind of each weight and bias in an Ascend description."""
    kinds = {}
    for name, kind in read_json(path).items():
        if not name.endswith((".weight", ".bias")):  # a field of the model, or a weight's companion
            continue
        if kind not in ("FLOAT", "W8A8", "W8A8_DYNAMIC"):
            raise CmxError(
                f"{path}: tensor {name} is {str(kind)[:40]!r}, expected FLOAT, W8A8 or W8A8_DYNAMIC"
            )
        kinds[name] = kind
    return kinds


def compressed_int8(floats: Iterable[str] = ()) -> dict[str, object]:
    """The `quantization_config` of an INT8 checkpoint that `cmx_jax.model.checkpoint.writer` writes.

    Args:
      floats: Modules that stay in floats besides `IGNORED`.
    """
    common = {"num_bits": 8, "type": "int", "symmetric": True}
    group = {
        "targets": ["Linear"],
        "weights": {**common, "strategy": "channel", "dynamic": False},
        "input_activations": {**common, "strategy": "token", "dynamic": True},
    }
    return {
        "quant_method": "compressed-tensors",
        "format": "int-quantized",
        "quantization_status": "compressed",
        "config_groups": {"group_0": group},
        "ignore": [*IGNORED, *floats],
    }
