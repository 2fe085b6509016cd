"""The safetensors files of a directory as one mapping from tensor name to array, read piecewise.

The library checks each file's header against the file. The numbers are then read at their offsets, so that
reading a part of a tensor costs only that part, types that the library's NumPy interface lacks (FP8) are read
too, and no file stays mapped.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open

from cmx_jax.errors import CmxError
from cmx_jax.model.fields import read_json

FLOATS: dict[str, type] = {"F32": np.float32, "BF16": ml_dtypes.bfloat16, "F16": np.float16}
DTYPES: dict[str, type] = {
    **FLOATS,
    "F8_E4M3": ml_dtypes.float8_e4m3fn,
    "F8_E8M0": ml_dtypes.float8_e8m0fnu,
    "I8": np.int8,
    "I32": np.int32,
    "I64": np.int64,
}


@dataclass(frozen=True)
class Header:
    """Location of a tensor.

    Attributes:
      file: File that holds the tensor.
      dtype: Type, by its name in safetensors.
      shape: Shape in the file.
      offset: Offset of the first number in the file, in bytes.
    """

    file: Path
    dtype: str
    shape: tuple[int, ...]
    offset: int

    @property
    def nbytes(self) -> int:
        """Bytes in the file; 0 for a type that is not read."""
        size = np.dtype(DTYPES[self.dtype]).itemsize if self.dtype in DTYPES else 0
        return int(np.prod(self.shape, dtype=np.int64)) * size


class TensorFiles:
    """All tensors of a directory, by name.

    Attributes:
      headers: Location of each tensor, by name.

    Raises:
      CmxError: There are none, a file is damaged, index and files disagree, or two files hold one tensor.
    """

    def __init__(self, directory: Path):
        self.directory = directory
        index = sorted(directory.glob("*.safetensors.index.json"))
        if len(index) > 1:
            raise CmxError(f"{directory}: has {len(index)} indices ({index[0].name}, ...): which is meant?")
        self.headers = self._indexed(index[0]) if index else self._all()

    def _indexed(self, path: Path) -> dict[str, Header]:
        """Headers of the files that an index names."""
        weight_map = read_json(path).get("weight_map")
        good = isinstance(weight_map, dict) and all(isinstance(f, str) for f in weight_map.values())
        if not good or not weight_map:
            raise CmxError(
                f"{path}: not a safetensors index: weight_map is empty or not an object of file names"
            )
        single = self.directory / "model.safetensors"
        if single.exists() and single.name not in weight_map.values():
            raise CmxError(f"{single}: is there, but {path.name} does not name it: which is meant?")
        headers: dict[str, Header] = {}
        for name in sorted(set(weight_map.values())):
            file = self.directory / name
            if Path(name).name != name or not file.is_file():
                raise CmxError(f"{path}: names {name[:200]}, which is not there")
            for tensor, header in read_headers(file).items():
                if weight_map.get(tensor) != name:
                    status = f"in {weight_map[tensor]} by" if tensor in weight_map else "missing from"
                    raise CmxError(f"{file}: holds tensor {tensor}, which is {status} the index")
                headers[tensor] = header
        for tensor, name in weight_map.items():
            if tensor not in headers:
                raise CmxError(f"{self.directory / name}: tensor {tensor} is not in it, but in the index")
        return headers

    def _all(self) -> dict[str, Header]:
        """Headers of all files of a directory without an index."""
        headers: dict[str, Header] = {}
        files = sorted(self.directory.glob("*.safetensors"))
        if not files:
            raise CmxError(f"{self.directory}: no *.safetensors there, expected a model's weights")
        for file in files:
            for tensor, header in read_headers(file).items():
                if tensor in headers:
                    first = headers[tensor].file.name
                    raise CmxError(f"{file}: holds tensor {tensor}, as {first} does: which is meant?")
                headers[tensor] = header
        return headers

    def __contains__(self, name: str) -> bool:
        return name in self.headers

    def read(self, name: str, index: tuple[Any, ...] = ()) -> np.ndarray:
        """Reads a tensor, or the part `tensor[index]`, into memory."""
        header = self.headers[name]
        shape, dtype = header.shape, DTYPES[header.dtype]
        if 0 in shape:
            return np.zeros(shape, dtype)[index]
        try:
            if not index:  # an ordinary read leaves no mapping
                count = int(np.prod(shape, dtype=np.int64))
                return np.fromfile(header.file, dtype, count, offset=header.offset).reshape(shape)
            mapped = np.memmap(header.file, dtype, "r", header.offset, shape or (1,))
            return np.array(mapped.reshape(shape)[index])
        except (OSError, ValueError) as error:
            raise CmxError(f"{header.file}: tensor {name} cannot be read ({error})") from None


def finite(values: np.ndarray, dtype: Any, name: str) -> np.ndarray:
    """Converts numbers to another type.

    Raises:
      CmxError: A number is not finite, or not in that type; the message begins with `name`.
    """
    with np.errstate(over="ignore"):  # what overflows is refused
        array = values.astype(dtype, copy=False)
    _check_finite(array, name)
    return array


def fill_finite(out: np.ndarray, values: np.ndarray, name: str) -> None:
    """Writes numbers into an array of another type, without a copy in that type.

    Raises:
      CmxError: A number is not finite, or not in that type; the message begins with `name`.
    """
    with np.errstate(over="ignore"):
        out[...] = values
    _check_finite(out, name)


def _check_finite(array: np.ndarray, name: str) -> None:
    if not np.isfinite(array).all():
        raise CmxError(f"{name} holds NaN or infinity as {array.dtype}, expected finite numbers")


def read_headers(file: Path) -> dict[str, Header]:
    """Reads the location of each tensor of a file.

    Raises:
      CmxError: The file is not a complete safetensors file.
    """
    try:
        with safe_open(file, framework="numpy"):  # checks lengths, offsets, types
            pass
        with file.open("rb") as opened:
            size = int.from_bytes(opened.read(8), "little")
            table = json.loads(opened.read(size))
    except (SafetensorError, OSError, ValueError, RecursionError) as error:
        raise CmxError(f"{file}: not a whole safetensors file ({error})") from None
    table.pop("__metadata__", None)
    return {
        name: Header(file, entry["dtype"], tuple(entry["shape"]), 8 + size + entry["data_offsets"][0])
        for name, entry in table.items()
    }
