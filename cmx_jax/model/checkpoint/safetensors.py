"""Writes a Hugging Face directory unit by unit: a file for each layer, and their index."""

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from cmx_jax.model.checkpoint.tensor_files import read_headers
from cmx_jax.model.checkpoint.writer import PieceReader, Unit, units, write_file

_BLOCK = 64 << 20  # bytes


class SafetensorsWriter:
    """Writes units as `model-00001-of-00062.safetensors` and so on."""

    def __init__(
        self,
        directory: Path,
        reader: PieceReader,
        dtype: str,
        wide: frozenset[tuple[str, str]],
        int8: frozenset[tuple[str, str]] | None = None,
    ):
        self.directory, self.reader = directory, reader
        c, mtp = reader.checkpoint.config, reader.checkpoint.mtp
        self.units = {unit.name: unit for unit in units(c, mtp, dtype, wide, int8)}
        count = len(self.units)
        self.files = {
            name: directory / f"model-{number:05}-of-{count:05}.safetensors"
            for number, name in enumerate(self.units, 1)
        }

    def write(self, unit: str) -> dict[str, str]:
        """Writes a unit; returns the sha256 of each tensor."""
        return write_file(self.files[unit], self.units[unit].entries, self.arrays(self.units[unit]))

    def arrays(self, unit: Unit) -> Iterator[tuple[str, np.ndarray]]:
        """Yields the tensors of a unit."""
        return unit.arrays(self.reader)

    def sums(self, unit: str) -> dict[str, str]:
        """Reads a unit from disk; returns the sha256 of each tensor."""
        sums, path = {}, self.files[unit]
        with path.open("rb") as file:
            for name, header in read_headers(path).items():
                file.seek(header.offset)
                digest, left = hashlib.sha256(), header.nbytes
                while left and (data := file.read(min(left, _BLOCK))):
                    digest.update(data)
                    left -= len(data)
                sums[name] = digest.hexdigest()
        return sums

    def write_index(self) -> None:
        """Writes `model.safetensors.index.json`."""
        entries = {name: unit.entries for name, unit in self.units.items()}
        total = sum(entry.nbytes for rows in entries.values() for entry in rows)
        weight_map = {e.name: self.files[name].name for name, rows in entries.items() for e in rows}
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        path = self.directory / "model.safetensors.index.json"
        unfinished = path.with_name(path.name + ".unfinished")
        unfinished.write_text(json.dumps(index, indent=2) + "\n")
        unfinished.rename(path)
