"""The values of a checkpoint's tensors, read from the bytes of its files one by one.

Plain NumPy that shares nothing with the package: no library reads the files, and every element is computed
by the formula that its format documents, in float32, in loops written to be obviously right.
"""

import json
import re
from pathlib import Path

import ml_dtypes
import numpy as np

TYPES = {
    "F32": np.float32,
    "F16": np.float16,
    "BF16": ml_dtypes.bfloat16,
    "F8_E4M3": ml_dtypes.float8_e4m3fn,
    "I8": np.int8,
    "I32": np.int32,
    "I64": np.int64,
}
BESIDE = re.compile(r"(weight_scale(_inv)?|weight_offset|(input|deq)_scale|input_offset|quant_bias)$")
STACKED = re.compile(r"(.*\.mlp\.experts)\.(gate_up|down)_proj$")


def read_file(path: Path) -> dict[str, np.ndarray]:
    """One safetensors file: eight bytes of length, a JSON header, the data."""
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header, data = json.loads(content[8 : 8 + length]), content[8 + length :]
    header.pop("__metadata__", None)
    tensors = {}
    for name, entry in header.items():
        start, end = entry["data_offsets"]
        tensors[name] = np.frombuffer(data[start:end], TYPES[entry["dtype"]]).reshape(entry["shape"])
    return tensors


def stored(directory: Path) -> dict[str, np.ndarray]:
    """All tensors of a directory as they are stored."""
    tensors: dict[str, np.ndarray] = {}
    for path in sorted(directory.glob("*.safetensors")):
        tensors.update(read_file(path))
    return tensors


def dequantised(directory: Path) -> dict[str, np.ndarray]:
    """All tensors of the plain checkpoint in float32, experts one by one."""
    tensors = stored(directory)
    config = json.loads((directory / "config.json").read_text())
    block = config.get("quantization_config", {}).get("weight_block_size")
    plain: dict[str, np.ndarray] = {}
    for name, tensor in tensors.items():
        if BESIDE.search(name):
            continue
        stack = STACKED.match(name)
        if stack:
            plain.update(unstacked(stack[1], stack[2], tensor))
        elif name + "_scale_inv" in tensors:
            plain[name] = of_blocks(tensor, tensors[name + "_scale_inv"], block)
        elif tensor.dtype == np.int8:
            plain[name] = of_channels(tensor, *scale_and_offset(name, tensor, tensors))
        else:
            plain[name] = tensor.astype(np.float32)
    return plain


def of_blocks(weight: np.ndarray, scale: np.ndarray, block: list[int]) -> np.ndarray:
    """Each element times the scale of its block."""
    result = np.zeros(weight.shape, np.float32)
    for row in range(weight.shape[0]):
        for column in range(weight.shape[1]):
            factor = scale[row // block[0], column // block[1]]
            result[row, column] = np.float32(weight[row, column]) * np.float32(factor)
    return result


def of_channels(weight: np.ndarray, scale: list[np.float32], offset: list[np.float32]) -> np.ndarray:
    """Each element less its row's offset, times its row's scale."""
    result = np.zeros(weight.shape, np.float32)
    for row in range(weight.shape[0]):
        for column in range(weight.shape[1]):
            result[row, column] = (np.float32(weight[row, column]) - offset[row]) * scale[row]
    return result


def scale_and_offset(
    name: str, weight: np.ndarray, tensors: dict[str, np.ndarray]
) -> tuple[list[np.float32], list[np.float32]]:
    """Scale and offset of each row of an INT8 matrix."""
    rows, module = weight.shape[0], name.removesuffix(".weight")
    offset = [np.float32(0)] * rows
    if name + "_offset" in tensors:
        offset = [np.float32(tensors[name + "_offset"][row, 0]) for row in range(rows)]
    if name + "_scale" in tensors:
        scale = tensors[name + "_scale"]
        return [np.float32(scale[row, 0] if scale.ndim == 2 else scale[0]) for row in range(rows)], offset
    product, of_inputs = tensors[module + ".deq_scale"], np.float32(tensors[module + ".input_scale"][0])
    return [from_bits(product[row]) / of_inputs for row in range(rows)], offset


def from_bits(number: np.generic) -> np.float32:
    """A float32, or the int64 whose low 32 bits are one."""
    if isinstance(number, np.int64):
        low = int(number) & 0xFFFFFFFF
        return np.frombuffer(low.to_bytes(4, "little"), np.float32)[0]
    return np.float32(number)


def unstacked(prefix: str, kind: str, tensor: np.ndarray) -> dict[str, np.ndarray]:
    """`gate_up [E, 2 F, D]` and `down [E, D, F]` under the names of single experts."""
    plain = {}
    for expert in range(tensor.shape[0]):
        matrix, name = tensor[expert].astype(np.float32), f"{prefix}.{expert}"
        half = matrix.shape[0] // 2
        parts = {"gate": matrix[:half], "up": matrix[half:]} if kind == "gate_up" else {"down": matrix}
        for part, array in parts.items():
            plain[f"{name}.{part}_proj.weight"] = array
    return plain
