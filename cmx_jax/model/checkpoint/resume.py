"""Writing a checkpoint unit by unit so that an interrupted run can be resumed, and verifying the result.

1. Each unit (a layer, or part of one) is written to a file of its own, then entered in `conversion.json` with
   a sha256 of each tensor. A run that was killed resumes after the last unit entered.
2. All units are read again and summed, and the source must be unchanged.
3. Only then the directory gets its `config.json`, without which it does not load.
"""

import errno
import fcntl
import hashlib
import json
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from cmx_jax.errors import CmxError
from cmx_jax.model.checkpoint.declared import DESCRIPTIONS, compressed_int8
from cmx_jax.model.checkpoint.manifest import NAME, REPORT, UNFINISHED, Manifest, read_manifest
from cmx_jax.model.checkpoint.safetensors import SafetensorsWriter
from cmx_jax.model.checkpoint.writer import linear
from cmx_jax.model.fields import read_json

LOCK = "conversion.lock"
_MAX_COPIED = 256 << 20  # bytes; larger than any tokenizer
_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth")


@runtime_checkable
class UnitWriter(Protocol):
    """Writes the units of one format.

    Attributes:
      units: Units by name, in the order in which they are written.
    """

    @property
    def units(self) -> Mapping[str, Any]: ...

    def write(self, unit: str) -> dict[str, str]:
        """Writes a unit; returns the sha256 of each tensor."""
        ...

    def sums(self, unit: str) -> dict[str, str]:
        """Reads a unit from disk; returns the sha256 of each tensor."""
        ...


def run_conversion(
    src: Path,
    dst: Path,
    src_fingerprint: str,
    plan: Manifest,
    make: Callable[[Manifest], UnitWriter],
    progress: Callable[[str], None],
) -> tuple[Manifest, int]:
    """Writes the missing units, verifies all, and makes the destination loadable.

    Args:
      src: Directory of the source checkpoint.
      dst: Directory to write to.
      src_fingerprint: Fingerprint of the source when it was opened.
      plan: Manifest without units, which describes the work.
      make: Function that makes the writer.
      progress: Callback for one line about the current action.

    Returns:
      The manifest, and the number of units that an earlier run had written.

    Raises:
      CmxError: Any of the reasons given in `cmx_jax.model.checkpoint.convert.convert`, but for arguments.
    """
    with _disk(dst):
        _begin(dst, plan)
        with _locked(dst):
            manifest = _read_plan(dst, plan)
            resumed = len(manifest.units)
            writer = make(manifest)
            _write(dst, writer, manifest, progress)
            _verify(dst, writer, manifest, progress)
            if fingerprint(src) != src_fingerprint:
                raise CmxError(f"{src} was changed while it was converted: delete {dst} and run this again")
            _finish(src, dst, manifest, writer)
    return manifest, resumed


def total_bytes(directory: Path) -> int:
    """Bytes of all files below a directory."""
    return sum(path.stat().st_size for path in directory.rglob("*") if path.is_file())


@contextmanager
def _disk(dst: Path) -> Iterator[None]:
    """Turns an error of the file system into a one-line `CmxError`."""
    try:
        yield
    except (OSError, RuntimeError) as error:  # RuntimeError: a symlink loop
        full = isinstance(error, OSError) and error.errno == errno.ENOSPC
        reason = "the disk is full" if full else str(error)
        raise CmxError(f"{dst}: conversion broke off ({reason}); run the same command to go on") from None


def check_directories(src: Path, dst: Path) -> None:
    """Checks that the source is a directory, and that the destination is not a file or inside the source.

    Raises:
      CmxError: One of them is not as described.
    """
    with _disk(dst):
        if not src.is_dir():
            raise CmxError(f"{src} is not a directory, expected a checkpoint")
        if dst.exists() and not dst.is_dir():
            raise CmxError(f"{dst} is a file, expected a directory to write to")
        if dst.resolve() == src.resolve() or src.resolve() in dst.resolve().parents:
            raise CmxError(f"{dst} lies in the source, expected another directory")


def fingerprint(src: Path) -> str:
    """Sha256 over the names, sizes and times of a checkpoint's weight files, and over its config."""
    digest = hashlib.sha256((src / "config.json").read_bytes() if (src / "config.json").is_file() else b"")
    for path in sorted((*src.glob("*"), *src.glob("units/**/*"))):
        counts = path.suffix == ".safetensors" or path.name.endswith(".index.json") or path.parent != src
        if path.is_file() and (counts or path.name == NAME or path.match(DESCRIPTIONS)):
            state = path.stat()
            digest.update(f"{path.relative_to(src)} {state.st_size} {state.st_mtime_ns}\n".encode())
    return digest.hexdigest()


def existing_manifest(dst: Path, source: str) -> Manifest | None:
    """Reads the manifest of an earlier run in a destination; None if there was no run.

    Args:
      dst: Directory to write to.
      source: Source that the manifest must name.

    Raises:
      CmxError: The directory holds other files or another conversion.
    """
    manifest = read_manifest(dst)
    if (
        manifest is None
        and dst.is_dir()
        and any(path.name not in (UNFINISHED, LOCK) for path in dst.iterdir())
    ):
        raise CmxError(f"{dst} is not empty and no conversion has begun there, expected a new directory")
    if manifest is not None and manifest.source != source:
        raise _other_conversion(dst)
    return manifest


def _other_conversion(dst: Path) -> CmxError:
    differences = "another source, format, type, layout or calibration"
    return CmxError(f"{dst} holds another conversion ({differences}): delete it, or take another directory")


def _begin(dst: Path, plan: Manifest) -> None:
    """Makes the destination, unless this conversion was begun there."""
    if existing_manifest(dst, plan.source) is None:
        dst.mkdir(parents=True, exist_ok=True)
        plan.save(dst)


@contextmanager
def _locked(dst: Path) -> Iterator[None]:
    """Holds a lock on the destination, which the system releases if the process is killed."""
    with (dst / LOCK).open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise CmxError(f"{dst}: another conversion is writing there, expected none") from None
        yield
        (dst / LOCK).unlink(missing_ok=True)


def _read_plan(dst: Path, plan: Manifest) -> Manifest:
    """The manifest in the destination, which must describe the same work."""
    manifest = read_manifest(dst)
    if manifest is None or not manifest.same_work(plan):
        raise _other_conversion(dst)
    return manifest


def _write(dst: Path, writer: UnitWriter, manifest: Manifest, progress: Callable[[str], None]) -> None:
    for number, unit in enumerate(writer.units):
        if unit not in manifest.units:
            progress(f"writing {unit} ({number + 1} of {len(writer.units)})")
            manifest.units[unit] = writer.write(unit)
            manifest.save(dst)


def _verify(dst: Path, writer: UnitWriter, manifest: Manifest, progress: Callable[[str], None]) -> None:
    """Reads all units again. Wrong ones are removed from the manifest, and the directory no longer loads."""
    wrong: dict[str, str] = {}
    for number, unit in enumerate(writer.units):
        progress(f"verifying {unit} ({number + 1} of {len(writer.units)})")
        expected = manifest.units[unit]
        try:
            actual = writer.sums(unit)
        except CmxError as error:
            wrong[unit] = str(error)
            continue
        names = sorted(name for name in {*actual, *expected} if actual.get(name) != expected.get(name))
        if names:
            wrong[unit] = f"tensor {names[0]} reads back otherwise"
    if not wrong:
        return
    for unit in wrong:
        del manifest.units[unit]
    manifest.complete = False
    manifest.save(dst)
    (dst / "config.json").unlink(missing_ok=True)
    unit, reason = next(iter(wrong.items()))
    count = f" and {len(wrong) - 1} more" if len(wrong) > 1 else ""
    raise CmxError(
        f"{dst}: {unit}{count} was written wrongly ({reason}); run the same command to write it again"
    )


def _finish(src: Path, dst: Path, manifest: Manifest, writer: UnitWriter) -> None:
    """Writes everything but the weights; the config is the last file."""
    for path in sorted(src.iterdir()):
        skipped = path.name in ("config.json", NAME, LOCK, REPORT) or ".index.json" in path.name
        skipped = skipped or path.match(DESCRIPTIONS) or path.suffix in _WEIGHTS or not path.is_file()
        if not skipped and path.stat().st_size < _MAX_COPIED:
            shutil.copyfile(path, dst / path.name)
    if isinstance(writer, SafetensorsWriter):
        writer.write_index()
    config = written_config(read_json(src / "config.json"), manifest.dtype, _float_modules(writer))
    unfinished = dst / "config.json.unfinished"
    unfinished.write_text(json.dumps(config, indent=2) + "\n")
    unfinished.rename(dst / "config.json")
    manifest.complete = True
    manifest.save(dst)


def _float_modules(writer: UnitWriter) -> list[str]:
    """Modules of an INT8 checkpoint that stay in floats."""
    if not isinstance(writer, SafetensorsWriter):
        return []
    parts = [(unit, tensor[0]) for unit in writer.units.values() for tensor in unit.tensors]
    return sorted(s.name.removesuffix(".weight") for unit, s in parts if linear(s) and not unit.quantized(s))


def written_config(raw: dict[str, Any], dtype: str, floats: Iterable[str] = ()) -> dict[str, Any]:
    """The `config.json` of a written checkpoint: the source's, as a text model of another type.

    Args:
      raw: Parsed `config.json` of the source.
      dtype: Type that was written: `float32`, `bfloat16` or `int8`.
      floats: Modules that are not INT8, if `dtype` is `int8`.
    """
    if "text_config" in raw:
        raw = {**raw["text_config"], "model_type": "llama4_text", "architectures": ["Llama4ForCausalLM"]}
    dropped = ("quantization_config", "compression_config", "quantize", "mla_quantize", "mtp_quantize")
    config = {key: value for key, value in raw.items() if key not in dropped}
    config["dtype" if "dtype" in config else "torch_dtype"] = "bfloat16" if dtype == "int8" else dtype
    if dtype == "int8":
        config["quantization_config"] = compressed_int8(floats)
    return config
