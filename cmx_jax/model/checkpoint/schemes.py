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

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from cmx_jax.errors import CmxError
from cmx_jax.model.checkpoint.declared import DESCRIPTION, Declared
from cmx_jax.model.checkpoint.files import FLOATS, TensorFiles
from cmx_jax.quant.blocks import dequantize_blocks, grid

QUANTIZED = {"F8_E4M3": "FP8", "I8": "INT8"}


@dataclass(frozen=True)
class Stored:
    """A tensor as it is stored.

    Attributes:
      scheme: in words.
      name: of its values.
      companions: names of scales and the like.
      decode: gives the tensor in float32, or as it is if plain.
      channels: gives the INT8 numbers and a scale for each row, where that is how it is stored and is to be
        computed (W8A8); None otherwise.
    """

    scheme: str
    name: str
    companions: tuple[str, ...]
    decode: Callable[[], np.ndarray]
    channels: Callable[[], tuple[np.ndarray, np.ndarray]] | None = None


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
    if announced.method == "ascend":
        return _ascend(files, name, kind)
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

    def channels() -> tuple[np.ndarray, np.ndarray]:
        return files.read(name), _factors(files, scale).reshape(-1, 1)

    w8a8 = announced.w8a8 and header.dtype == "I8" and block == (1, shape[1])
    words = f"{QUANTIZED[header.dtype]} {words}"
    return Stored(words, name, (scale,), decode, channels if w8a8 else None)


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
        q, offset = files.read(name), None
        if "weight_offset" in names:
            offset = _offset(files, names["weight_offset"]).reshape(rows, 1)
        if kind == "W8A8":
            _expect_no_bias(files, names, q)
        return dequantize_blocks(q, scale().reshape(rows, 1), (1, columns), offset)

    return Stored(f"INT8 Ascend {kind}", name, tuple(names.values()), decode)


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


def _offset(files: TensorFiles, name: str) -> np.ndarray:
    offset = files.read(name).astype(np.float32)
    if not np.isfinite(offset).all():
        raise CmxError(f"tensor {name} holds NaN or infinity, expected finite offsets")
    return offset


def check_scales(files: TensorFiles, found: Stored) -> None:
    """Reads a stored tensor's scales and offsets and refuses what is none."""
    for name in found.companions:
        if name.endswith(("scale", "scale_inv")):
            _factors(files, name)
        elif name.endswith("offset"):
            _offset(files, name)
