"""`conversion.json`: the progress of a conversion, so that it can be resumed and verified."""

import json
import os
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from cmx_jax.errors import CmxError
from cmx_jax.model.fields import read_json

NAME = "conversion.json"
UNFINISHED = f"{NAME}.unfinished"
REPORT = "quantization.json"  # lies beside it after a quantisation: the errors of each matrix
FORMATS = ("safetensors", "orbax")


@dataclass
class Manifest:
    """The state of a conversion.

    Attributes:
      source: Fingerprint of the source.
      format: `safetensors` or `orbax`.
      dtype: Type of most fields: `float32`, `bfloat16` or `int8`.
      wide: Fields (`stack/path`) that are float32 nevertheless.
      mtp: True if MTP layers are stored.
      slots: Number of expert slots of the layout (Orbax), else 0.
      placement: Slot of each expert (Orbax), else empty.
      int8: Fields (`stack/path`) that are INT8, if they were chosen one by one.
      units: Sha256 of each tensor, by finished unit.
      complete: True once all units are written and verified.
    """

    source: str
    format: str
    dtype: str
    wide: list[str]
    mtp: bool
    slots: int
    placement: list[int]
    int8: list[str] = field(default_factory=list)
    units: dict[str, dict[str, str]] = field(default_factory=dict)
    complete: bool = False

    def save(self, directory: Path) -> None:
        """Replaces the file of a directory in one step."""
        unfinished = directory / UNFINISHED
        with unfinished.open("w") as file:
            json.dump(asdict(self), file, indent=1)
            file.flush()
            os.fsync(file.fileno())
        unfinished.rename(directory / NAME)

    def same_work(self, other: "Manifest") -> bool:
        """Returns whether both manifests describe the same source and the same output."""
        return self._work() == other._work()

    def _work(self) -> tuple[Any, ...]:
        layout = self.slots, self.placement
        return self.source, self.format, self.dtype, self.wide, self.mtp, *layout, self.int8


_TYPES = {
    "source": str,
    "format": str,
    "dtype": str,
    "wide": list,
    "mtp": bool,
    "slots": int,
    "placement": list,
    "int8": list,
    "units": dict,
    "complete": bool,
}


def read_manifest(directory: Path) -> Manifest | None:
    """Reads the manifest of a directory; None if there is none.

    Raises:
      CmxError: The manifest is damaged; the field is named.
    """
    path = directory / NAME
    if not path.is_file():
        return None
    raw = {"int8": [], **read_json(path)}
    for name, kind in _TYPES.items():
        if type(raw.get(name)) is not kind:
            raise CmxError(f"{path}: {name} is {str(raw.get(name))[:40]!r}, expected {kind.__name__}")
    placement, slots = raw["placement"], raw["slots"]
    if not all(type(slot) is int and 0 <= slot < slots for slot in placement):
        raise CmxError(f"{path}: placement is not a list of slots below {slots}")
    for name, known in (("dtype", ("float32", "bfloat16", "int8")), ("format", FORMATS)):
        if raw[name] not in known:
            raise CmxError(f"{path}: {name} is {raw[name][:40]!r}, expected one of {', '.join(known)}")
    for unit, sums in raw["units"].items():
        if not isinstance(sums, dict) or not all(isinstance(value, str) for value in sums.values()):
            raise CmxError(f"{path}: units.{unit[:40]} is not an object of checksums")
    return Manifest(**{name: raw[name] for name in _TYPES})
