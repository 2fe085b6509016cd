"""How a tensor of a checkpoint is stored: plain, or small numbers with scales, in the forms that people
publish.

    FP8      F8_E4M3 with `weight_scale_inv`, a scale for each 128x128 block (DeepSeek-V3)
    INT8     I8 with `weight_scale`, one for each output channel (compressed-tensors "int-quantized", or not
             announced), or with `weight_scale_inv`, one for each block
    Ascend   I8 as msModelSlim's `quant_model_description.json` says: W8A8_DYNAMIC has `weight_scale` and
             `weight_offset`; W8A8 folds the activation's static scale into `deq_scale`

All are decoded to float32 by one formula, `(q - offset) * scale`. What is announced and what is found must
agree.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

from cmx_jax.errors import CmxError
from cmx_jax.model.checkpoint.files import FLOATS, TensorFiles
from cmx_jax.model.families import read_json
from cmx_jax.model.fields import mapping
from cmx_jax.quant.blocks import dequantize_blocks, grid

QUANTIZED = {"F8_E4M3": "FP8", "I8": "INT8"}
DESCRIPTION = "quant_model_description.json"
# Modules that stay in floats, as compressed-tensors' `ignore` says it: what is sensitive and small (section
# 4.5).
IGNORED = ("lm_head", r"re:.*\.(gate|router)$")


@dataclass(frozen=True)
class Declared:
    """What `config.json` and the Ascend description announce.

    Attributes:
      method: `quant_method`, `ascend`, or None.
      block: rows and columns of a block of scales.
      strategies: of compressed-tensors: `channel`, `tensor` or `group`, or several.
      types: what quantised weights may be.
      group: width of a group of scales within a row.
      ignored: modules that compressed-tensors left alone, whole names and patterns.
      ascend: tensor name -> FLOAT, W8A8 or W8A8_DYNAMIC.
    """

    method: str | None = None
    block: tuple[int, int] = (128, 128)
    strategies: frozenset[str] = frozenset({"channel"})
    types: frozenset[str] = frozenset({"I8"})
    group: int | None = None
    ignored: tuple[frozenset[str], tuple[re.Pattern[str], ...]] = (frozenset(), ())
    ascend: Mapping[str, str] = field(default_factory=dict)

    def ignores(self, name: str) -> bool:
        """Whether the tensor's module was left alone."""
        module = name.removesuffix(".weight")
        return module in self.ignored[0] or any(pattern.match(module) for pattern in self.ignored[1])


def _refuse(name: str, given: object, expected: str) -> NoReturn:
    raise CmxError(f"config: quantization_config.{name} is {str(given)[:60]!r}, expected {expected}")


def _block(raw: Mapping[str, Any]) -> tuple[int, int]:
    block = raw.get("weight_block_size")
    if not isinstance(block, list) or len(block) != 2 or not all(type(n) is int and n > 0 for n in block):
        _refuse("weight_block_size", block, "two positive integers")
    return block[0], block[1]


def _compressed(raw: Mapping[str, Any]) -> Declared:
    formats = ("int-quantized", "float-quantized", "naive-quantized", None)
    if raw.get("format") not in formats:
        _refuse("format", raw.get("format"), "int-quantized or float-quantized")
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
    return Declared(
        "compressed-tensors",
        strategies=frozenset(w["strategy"] for w in weights.values()),
        types=frozenset("F8_E4M3" if w.get("type") == "float" else "I8" for w in weights.values()),
        group=next(iter(sizes), None),
        ignored=_ignored(raw.get("ignore")),
    )


def _compressed_weights(where: str, weights: Any) -> Mapping[str, Any]:
    """A group's weights, checked."""
    if not isinstance(weights, Mapping):
        _refuse(where, weights, "an object")
    expected: dict[str, tuple[Any, ...]] = {
        "num_bits": (8, None),
        "symmetric": (True, None),
        "strategy": ("channel", "tensor", "group"),
        "type": ("int", "float", None),
    }
    for key, values in expected.items():
        if weights.get(key) not in values:
            _refuse(f"{where}.{key}", weights.get(key), f"{values[0]}")
    size = weights.get("group_size")
    if weights["strategy"] == "group" and (type(size) is not int or size < 1):
        _refuse(f"{where}.group_size", size, "a positive integer")
    return weights


def _ignored(given: Any) -> tuple[frozenset[str], tuple[re.Pattern[str], ...]]:
    """`ignore`: names of modules, or patterns behind `re:`."""
    names = [] if given is None else given
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        _refuse("ignore", given, "a list of module names")
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
    "w8a8_int8": lambda raw: Declared("w8a8_int8"),
    "ascend": lambda raw: Declared("ascend"),
}


def declared(raw: Mapping[str, Any], directory: Path) -> Declared:
    """What a directory announces.

    Raises:
      CmxError: a method, width or kind that is not read; the field is named.
    """
    where = "compression_config" if raw.get("quantization_config") is None else "quantization_config"
    config = mapping(raw, where)
    found = Declared()
    if raw.get(where) is not None:
        method = config.get("quant_method")
        if not isinstance(method, str) or method not in METHODS:
            _refuse("quant_method", method, f"one of {', '.join(METHODS)}")
        found = METHODS[method](config)
    if (directory / DESCRIPTION).exists():  # an FP8 model's quantization_config may have stayed beside it
        return Declared("ascend", ascend=_description(directory / DESCRIPTION))
    if found.method == "ascend":
        raise CmxError(f"{directory}: quant_method is ascend, but there is no {DESCRIPTION}")
    return found


def _description(path: Path) -> dict[str, str]:
    kinds = {}
    for name, kind in read_json(path).items():
        if not name.endswith((".weight", ".bias")):  # of the model as a whole, or of a weight's companions
            continue
        if kind not in ("FLOAT", "W8A8", "W8A8_DYNAMIC"):
            raise CmxError(
                f"{path}: tensor {name} is {str(kind)[:40]!r}, expected FLOAT, W8A8 or W8A8_DYNAMIC"
            )
        kinds[name] = kind
    return kinds


def compressed_int8() -> dict[str, Any]:
    """The `quantization_config` of what `cmx_jax.model.checkpoint.writer` writes as INT8."""
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
        "ignore": list(IGNORED),
    }


@dataclass(frozen=True)
class Stored:
    """A tensor as it is stored.

    Attributes:
      scheme: in words.
      name: of its values.
      companions: names of scales and the like.
      decode: gives the tensor in float32, or as it is if plain.
    """

    scheme: str
    name: str
    companions: tuple[str, ...]
    decode: Callable[[], np.ndarray]


def plain(files: TensorFiles, name: str, at: tuple[Any, ...] = (), transposed: bool = False) -> Stored:
    """A tensor of floats, or the part `at` of one."""
    dtype = files.headers[name].dtype
    if dtype not in FLOATS:
        raise CmxError(f"tensor {name} is {dtype}, expected one of {', '.join(sorted(FLOATS))}")

    def decode() -> np.ndarray:
        values = files.read(name, at)
        return values.T if transposed else values

    return Stored(dtype, name, (), decode)


def stored(files: TensorFiles, name: str, announced: Declared) -> Stored:
    """How a matrix that is in the files is stored there.

    Raises:
      CmxError: a scale is missing or misshapen, or the type is not what was announced; the tensor is named.
    """
    header = files.headers[name]
    kind = announced.ascend.get(name)
    if header.dtype in FLOATS:
        if kind not in (None, "FLOAT"):
            raise CmxError(f"tensor {name} is {header.dtype}, but {DESCRIPTION} says {kind}")
        return plain(files, name)
    if header.dtype not in QUANTIZED:
        known = ", ".join([*sorted(FLOATS), *QUANTIZED])
        raise CmxError(f"tensor {name} is {header.dtype}, expected one of {known}")
    if header.dtype not in announced.types:
        says = f"quant_method {announced.method!r}" if announced.method else "no quantization_config"
        raise CmxError(f"tensor {name} is {header.dtype}, but the config has {says}")
    if announced.ignores(name):
        raise CmxError(f"tensor {name} is {header.dtype}, but quantization_config.ignore says it is not")
    if len(header.shape) != 2:
        raise CmxError(f"tensor {name} is {header.dtype} of shape {list(header.shape)}, expected a matrix")
    if announced.method == "ascend":
        return _ascend(files, name, str(kind))
    return _scaled(files, name, announced)


def _scaled(files: TensorFiles, name: str, announced: Declared) -> Stored:
    header = files.headers[name]
    shape = (header.shape[0], header.shape[1])
    by_block, by_row = f"{name}_scale_inv", f"{name}_scale"
    if by_block in files and announced.method not in ("compressed-tensors", "w8a8_int8"):
        scale, block = by_block, announced.block
        words = f"{block[0]}x{block[1]} blocks"
        _expect_shape(files, scale, {grid(shape, block)})
    elif by_row in files and announced.method not in ("fp8", "blockwise_int8"):
        scale = by_row
        block, words = _row_block(files, scale, shape, announced)
    else:
        expected = by_block if announced.method in ("fp8", "blockwise_int8") else by_row
        raise CmxError(f"tensor {name} is {header.dtype}, but its scale {expected} is missing")
    _expect_float(files, scale)

    def decode() -> np.ndarray:
        factors = _factors(files, scale).reshape(grid(shape, block))
        return dequantize_blocks(files.read(name), factors, block)

    return Stored(f"{QUANTIZED[header.dtype]} {words}", name, (scale,), decode)


def _row_block(
    files: TensorFiles, scale: str, shape: tuple[int, int], announced: Declared
) -> tuple[tuple[int, int], str]:
    """The block that a `weight_scale` is for, by the announced strategies and its shape."""
    rows, columns = shape
    known: dict[str, tuple[set[tuple[int, ...]], tuple[int, int], str]] = {
        "channel": ({(rows, 1), (rows,)}, (1, columns), "per channel"),
        "tensor": ({(1,), ()}, shape, "per tensor"),
    }
    if announced.group is not None:
        block = (1, announced.group)
        known["group"] = ({grid(shape, block)}, block, f"groups of {announced.group}")
    for name in announced.strategies:
        shapes, block, words = known[name]
        if files.headers[scale].shape in shapes:
            return block, words
    _expect_shape(files, scale, set().union(*(known[name][0] for name in announced.strategies)))
    raise AssertionError


def _ascend(files: TensorFiles, name: str, kind: str | None) -> Stored:
    """W8A8_DYNAMIC: `(q - weight_offset) * weight_scale`.

    W8A8, whose activations have a static scale, has those two or only `deq_scale = input_scale *
    weight_scale`.
    """
    if kind not in ("W8A8", "W8A8_DYNAMIC"):
        raise CmxError(f"tensor {name} is I8, but {DESCRIPTION} says {kind or 'nothing'} of it")
    (rows, columns), base = files.headers[name].shape, name.removesuffix("weight")
    column: set[tuple[int, ...]] = {(rows, 1), (rows,)}
    one: set[tuple[int, ...]] = {(1,), ()}
    needed = {"weight_scale": column, "weight_offset": column}
    if kind == "W8A8":
        static = {"deq_scale": column, "input_scale": one, "input_offset": one, "quant_bias": column}
        needed = static | (needed if f"{base}weight_scale" in files else {})
    names = {part: f"{base}{part}" for part in needed}
    for part, shapes in needed.items():
        if names[part] not in files:
            raise CmxError(f"tensor {name} is {kind}, but its {names[part]} is missing")
        _expect_shape(files, names[part], shapes)
        if part == "quant_bias" and files.headers[names[part]].dtype != "I32":
            raise CmxError(f"tensor {names[part]} is {files.headers[names[part]].dtype}, expected I32")
        if part != "quant_bias" and not (part == "deq_scale" and files.headers[names[part]].dtype == "I64"):
            _expect_float(files, names[part])

    def scale() -> np.ndarray:
        if "weight_scale" in names:
            return _factors(files, names["weight_scale"])
        return _factors(files, names["deq_scale"]) / _factors(files, names["input_scale"]).reshape(())

    def decode() -> np.ndarray:
        check_scales(files, found)
        q, offset = files.read(name), None
        if "weight_offset" in names:
            offset = files.read(names["weight_offset"]).astype(np.float32).reshape(rows, 1)
        if kind == "W8A8":
            _expect_no_bias(files, names, q)
        return dequantize_blocks(q, scale().reshape(rows, 1), (1, columns), offset)

    found = Stored(f"INT8 Ascend {kind}", name, tuple(names.values()), decode)
    return found


def _expect_no_bias(files: TensorFiles, names: dict[str, str], q: np.ndarray) -> None:
    """`quant_bias` is only what the activation's offset asks for: `-offset * sum(q)`, rounded."""
    offset = files.read(names["input_offset"]).astype(np.float64).reshape(())
    wanted = -offset * q.astype(np.int64).sum(axis=1)
    given = files.read(names["quant_bias"]).astype(np.float64).reshape(-1)
    if not np.abs(given - wanted).max(initial=0) <= 1:
        raise CmxError(
            f"tensor {names['quant_bias']} holds a bias of its own, which this architecture has not"
        )


def _expect_shape(files: TensorFiles, name: str, shapes: set[tuple[int, ...]]) -> None:
    given = files.headers[name].shape
    if given not in shapes:
        expected = " or ".join(str(list(shape)) for shape in sorted(shapes, key=len, reverse=True))
        raise CmxError(f"tensor {name} has shape {list(given)}, expected {expected}")


def _expect_float(files: TensorFiles, name: str) -> None:
    dtype = files.headers[name].dtype
    if dtype not in FLOATS:
        raise CmxError(f"tensor {name} is {dtype}, expected one of {', '.join(sorted(FLOATS))}")


def _factors(files: TensorFiles, name: str) -> np.ndarray:
    """Scales as float32: finite, not negative. An int64 holds the bits of one (Ascend, float16 models)."""
    scale = files.read(name)
    if scale.dtype == np.int64:
        scale = scale.astype(np.uint32).view(np.float32)
    scale = scale.astype(np.float32)
    if not np.isfinite(scale).all() or (scale < 0).any():
        raise CmxError(
            f"tensor {name} holds {_worst(scale)}, expected scales that are finite and not negative"
        )
    return scale


def _worst(scale: np.ndarray) -> str:
    return "NaN" if np.isnan(scale).any() else "infinity" if np.isinf(scale).any() else "a negative scale"


def check_scales(files: TensorFiles, found: Stored) -> None:
    """Reads a stored tensor's scales and offsets and refuses what is none."""
    for name in found.companions:
        if name.endswith(("scale", "scale_inv")):
            _factors(files, name)
        elif name.endswith("offset") and not np.isfinite(files.read(name).astype(np.float32)).all():
            raise CmxError(f"tensor {name} holds NaN or infinity, expected finite offsets")
