"""Storage schemes of published checkpoints: plain floats, or narrow numbers with scales.

    FP8      F8_E4M3 with `weight_scale_inv`, a scale for each 128x128 block (DeepSeek-V3)
    INT8     I8 with `weight_scale`, one for each output channel (compressed-tensors "int-quantized", or not
             announced), or with `weight_scale_inv`, one for each block
    block    F8_E4M3 or I8 with `weight_scale`, one for each block (compressed-tensors "block")
    Ascend   I8 by msModelSlim's `quant_model_description.json`: W8A8_DYNAMIC has `weight_scale` and
             `weight_offset`; W8A8 folds the activation's static scale into `deq_scale`

All are decoded to float32 by one formula, `(q - offset) * scale`. The files must agree with the announced
scheme.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from cmx_jax.errors import CmxError
from cmx_jax.model.checkpoint.declared import DESCRIPTION, Declared
from cmx_jax.model.checkpoint.tensor_files import FLOATS, TensorFiles
from cmx_jax.quant.blocks import dequantize_blocks, grid

QUANTIZED = {"F8_E4M3": "FP8", "I8": "INT8"}
SCALES = (*FLOATS, "F8_E8M0")  # the last are powers of two


@dataclass(frozen=True)
class Stored:
    """A tensor as it is stored.

    Attributes:
      scheme: Storage scheme in words.
      name: Name of the tensor in the files.
      companions: Names of its scales, offsets and the like.
      decode: Function that reads the tensor, in float32 unless it is plain.
      channels: Function that reads the INT8 numbers and a scale for each row; None unless the tensor is
        stored so and is to be computed in W8A8.
    """

    scheme: str
    name: str
    companions: tuple[str, ...]
    decode: Callable[[], np.ndarray]
    channels: Callable[[], tuple[np.ndarray, np.ndarray]] | None = None


def plain(files: TensorFiles, name: str, index: tuple[Any, ...] = (), transposed: bool = False) -> Stored:
    """Storage scheme of a tensor of floats, or of a part of one.

    Args:
      files: Files of the checkpoint.
      name: Name of the tensor.
      index: Index of the part; empty for the tensor itself.
      transposed: True if the part is stored transposed.

    Raises:
      CmxError: The tensor is not one of floats.
    """
    dtype = files.headers[name].dtype
    if dtype not in FLOATS:
        raise CmxError(f"tensor {name} is {dtype}, expected one of {', '.join(sorted(FLOATS))}")
    return Stored(dtype, name, (), partial(_decode_plain, files, name, index, transposed))


def _decode_plain(files: TensorFiles, name: str, index: tuple[Any, ...], transposed: bool) -> np.ndarray:
    values = files.read(name, index)
    return values.T if transposed else values


def stored(files: TensorFiles, name: str, announced: Declared) -> Stored:
    """Storage scheme of a matrix.

    Args:
      files: Files of the checkpoint.
      name: Name of the matrix, which must be in the files.
      announced: Quantisation that the checkpoint announces.

    Raises:
      CmxError: A scale is missing or misshapen, or the type is not as announced; the tensor is named.
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
    """Storage scheme of a matrix with one scale for each block, channel, group or tensor."""
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
    w8a8 = announced.w8a8 and header.dtype == "I8" and block == (1, shape[1])
    return Stored(
        f"{QUANTIZED[header.dtype]} {words}",
        name,
        (scale,),
        decode=partial(_decode_scaled, files, name, scale, block),
        channels=partial(_read_channels, files, name, scale) if w8a8 else None,
    )


def _decode_scaled(files: TensorFiles, name: str, scale: str, block: tuple[int, int]) -> np.ndarray:
    q = files.read(name)
    return dequantize_blocks(q, _factors(files, scale).reshape(grid((q.shape[0], q.shape[1]), block)), block)


def _read_channels(files: TensorFiles, name: str, scale: str) -> tuple[np.ndarray, np.ndarray]:
    return files.read(name), _factors(files, scale).reshape(-1, 1)


def _row_block(
    files: TensorFiles, scale: str, shape: tuple[int, int], announced: Declared
) -> tuple[tuple[int, int], str]:
    """Shape of the block that one scale of a `weight_scale` is for, by strategy and shape, and its name."""
    rows, columns = shape
    known: dict[str, tuple[set[tuple[int, ...]], tuple[int, int], str]] = {
        "channel": ({(rows, 1), (rows,)}, (1, columns), "per channel"),
        "tensor": ({(1,), ()}, shape, "per tensor"),
    }
    if "block" in announced.strategies:
        rows_columns = announced.block
        words = f"{rows_columns[0]}x{rows_columns[1]} blocks"
        known["block"] = ({grid(shape, rows_columns)}, rows_columns, words)
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
    """Storage scheme of an Ascend matrix: `(q - weight_offset) * weight_scale`.

    W8A8, whose activations have a static scale, has those two tensors or only `deq_scale = input_scale *
    weight_scale`.
    """
    if kind not in ("W8A8", "W8A8_DYNAMIC"):
        raise CmxError(f"tensor {name} is I8, but {DESCRIPTION} says {kind or 'nothing'} of it")
    rows, base = files.headers[name].shape[0], name.removesuffix("weight")
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
    decode = partial(_decode_ascend, files, name, names)
    return Stored(f"INT8 Ascend {kind}", name, tuple(names.values()), decode)


def _decode_ascend(files: TensorFiles, name: str, names: dict[str, str]) -> np.ndarray:
    """Decodes an Ascend matrix; `names` are those of its companions by their last part."""
    q, offset = files.read(name), None
    rows, columns = q.shape
    if "weight_offset" in names:
        offset = _offset(files, names["weight_offset"]).reshape(rows, 1)
    if "quant_bias" in names:
        _expect_no_bias(files, names, q)
    if "weight_scale" in names:
        scale = _factors(files, names["weight_scale"])
    else:
        scale = _factors(files, names["deq_scale"]) / _factors(files, names["input_scale"]).reshape(())
    return dequantize_blocks(q, scale.reshape(rows, 1), (1, columns), offset)


def _expect_no_bias(files: TensorFiles, names: dict[str, str], q: np.ndarray) -> None:
    """Checks that `quant_bias` is only due to the activation's offset: `-offset * sum(q)`, rounded."""
    offset = files.read(names["input_offset"]).astype(np.float64).reshape(())
    expected = -offset * q.astype(np.int64).sum(axis=1)
    bias = files.read(names["quant_bias"]).astype(np.float64).reshape(-1)
    if not np.abs(bias - expected).max(initial=0) <= 1:
        raise CmxError(
            f"tensor {names['quant_bias']} holds a bias of its own, which this architecture does not have"
        )


def _expect_shape(files: TensorFiles, name: str, shapes: set[tuple[int, ...]]) -> None:
    shape = files.headers[name].shape
    if shape not in shapes:
        expected = " or ".join(str(list(s)) for s in sorted(shapes, key=len, reverse=True))
        raise CmxError(f"tensor {name} has shape {list(shape)}, expected {expected}")


def _expect_float(files: TensorFiles, name: str) -> None:
    dtype = files.headers[name].dtype
    if dtype not in SCALES:
        raise CmxError(f"tensor {name} is {dtype}, expected one of {', '.join(sorted(SCALES))}")


def _factors(files: TensorFiles, name: str) -> np.ndarray:
    """Reads scales as float32, which must be finite and not negative.

    An int64 holds the bits of a float32 (Ascend, float16 models).
    """
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


def check_scales(files: TensorFiles, tensor: Stored) -> None:
    """Reads a tensor's scales and offsets and checks their values.

    Raises:
      CmxError: A value is not finite, or a scale is negative.
    """
    for name in tensor.companions:
        if name.endswith(("scale", "scale_inv")):
            _factors(files, name)
        elif name.endswith("offset"):
            _offset(files, name)
