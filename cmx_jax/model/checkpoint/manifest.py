"""`conversion.json`: what a conversion has written so far, so that it can be resumed and verified."""

import json
import os
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from cmx_jax.errors import CmxError
from cmx_jax.model.fields import read_json

NAME = "conversion.json"


@dataclass
class Manifest:
    """The state of a conversion.

    Attributes:
      source: fingerprint of what is converted.
      format: `safetensors` or `orbax`.
      dtype: of the matrices.
      mtp: whether MTP layers are stored.
      slots: expert slots of the layout (Orbax).
      placement: slot of each expert (Orbax).
      units: of each finished unit the sha256 of each tensor.
      complete: everything was written and verified.
    """

    source: str
    format: str
    dtype: str
    mtp: bool
    slots: int
    placement: list[int]
    units: dict[str, dict[str, str]] = field(default_factory=dict)
    complete: bool = False

    def save(self, directory: Path) -> None:
        """Replaces the file at once."""
        unfinished = directory / f"{NAME}.unfinished"
        with unfinished.open("w") as file:
            json.dump(asdict(self), file, indent=1)
            file.flush()
            os.fsync(file.fileno())
        unfinished.rename(directory / NAME)

    def same_work(self, other: "Manifest") -> bool:
        """Whether both convert the same to the same."""
        return self._work() == other._work()

    def _work(self) -> tuple[Any, ...]:
        return self.source, self.format, self.dtype, self.mtp, self.slots, self.placement


_TYPES = {
    "source": str,
    "format": str,
    "dtype": str,
    "mtp": bool,
    "slots": int,
    "placement": list,
    "units": dict,
    "complete": bool,
}


def read_manifest(directory: Path) -> Manifest | None:
    """The manifest of a directory, None where there is none.

    Raises:
      CmxError: it is damaged.
    """
    path = directory / NAME
    if not path.is_file():
        return None
    raw = read_json(path)
    for name, kind in _TYPES.items():
        if type(raw.get(name)) is not kind:
            raise CmxError(f"{path}: {name} is {str(raw.get(name))[:40]!r}, expected {kind.__name__}")
    placement, slots = raw["placement"], raw["slots"]
    if not all(type(slot) is int and 0 <= slot < slots for slot in placement):
        raise CmxError(f"{path}: placement is not a list of slots below {slots}")
    if raw["dtype"] not in ("float32", "bfloat16", "int8"):
        raise CmxError(f"{path}: dtype is {raw['dtype'][:40]!r}, expected float32, bfloat16 or int8")
    return Manifest(**{name: raw[name] for name in _TYPES})
