"""Conversion: any checkpoint that loads to safetensors or Orbax, layer by layer.

1. Open SRC: everything is there and understood, or it is refused.
2. Each layer is written to a name of its own, then entered in `conversion.json` with a sha256 of each tensor.
   What is killed goes on behind the last layer entered.
3. Everything is read again and summed, and SRC is seen to be what it was. Only then the directory gets its
   config, so that it loads.
"""

import errno
import fcntl
import hashlib
import json
import math
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from cmx_jax.errors import CmxError
from cmx_jax.mesh.layout import Layout, expert_parallel
from cmx_jax.model.checkpoint.declared import DESCRIPTION, compressed_int8
from cmx_jax.model.checkpoint.load import Checkpoint, open_checkpoint
from cmx_jax.model.checkpoint.manifest import FORMATS, NAME, REPORT, UNFINISHED, Manifest, read_manifest
from cmx_jax.model.checkpoint.safetensors import SafetensorsWriter
from cmx_jax.model.checkpoint.writer import DTYPES, PieceReader, linear
from cmx_jax.model.fields import read_json
from cmx_jax.model.weights import all_leaves

LOCK = "conversion.lock"
_MOST_COPIED = 256 << 20  # larger than any tokenizer
_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth")


@runtime_checkable
class UnitWriter(Protocol):
    """Writes units of one format."""

    units: Any

    def write(self, unit: str) -> dict[str, str]:
        """Writes a unit; returns each tensor's sha256."""
        ...

    def sums(self, unit: str) -> dict[str, str]:
        """The sha256 of each tensor as it is on disk."""
        ...


def convert(
    source: str | Path,
    destination: str | Path,
    *,
    format: str = "safetensors",
    dtype: str | None = None,
    ranks: int | None = None,
    progress: Callable[[str], None] = lambda _: None,
) -> dict[str, Any]:
    """Converts a checkpoint; what was broken off is resumed by the same call.

    Args:
      source: a Hugging Face or Orbax directory.
      destination: a directory that is new, empty, or holds the beginning of this conversion.
      format: `safetensors` or `orbax`.
      dtype: `bfloat16`, `float32`, or `int8` (compressed-tensors; safetensors only); None loses no digit of
        what is stored as floats, and gives bfloat16 for what is quantised.
      ranks: expert-parallel ranks of the layout that an Orbax directory is written for; None is one.
      progress: told what is being done.

    Returns:
      What was done: units, tensors and bytes, and how many units were there already.

    Raises:
      CmxError: source or arguments are refused, the destination holds something else, the disk is full, the
        source changed meanwhile, or what was written does not read back as it was.
    """
    src, dst = Path(source), Path(destination)
    check_directories(src, dst)
    _check_arguments(format, dtype, ranks)
    progress("checking the source")
    seen = fingerprint(src)
    checkpoint = open_checkpoint(src)
    kind, wide = types(checkpoint, dtype)
    layout = expert_parallel(1 if ranks is None else ranks, checkpoint.config.n_routed_experts)
    wanted = _manifest(seen, checkpoint, format, kind, wide, layout)

    def writer(manifest: Manifest) -> UnitWriter:
        return _writer(dst, checkpoint, manifest, layout, wide)

    manifest, resumed = run_conversion(src, dst, seen, wanted, writer, progress)
    return {
        "source": str(src),
        "destination": str(dst),
        "format": format,
        "dtype": kind,
        "units": len(manifest.units),
        "units_resumed": resumed,
        "tensors": sum(len(sums) for sums in manifest.units.values()),
        "bytes": sum(path.stat().st_size for path in dst.rglob("*") if path.is_file()),
        "verified": True,
    }


def run_conversion(
    src: Path,
    dst: Path,
    seen: str,
    wanted: Manifest,
    make: Callable[[Manifest], UnitWriter],
    progress: Callable[[str], None],
) -> tuple[Manifest, int]:
    """Writes and verifies what is not there yet; returns the manifest, and how many units were there already.

    Args:
      src: the checkpoint.
      dst: where to write.
      seen: fingerprint of the source when it was opened.
      wanted: what is to be written.
      make: makes the writer.
      progress: told what is being done.

    Raises:
      CmxError: see `convert`.
    """
    with _disk(dst):
        _begin(dst, wanted)
        with _locked(dst):
            manifest = _resumed(dst, wanted)
            resumed = len(manifest.units)
            writer = make(manifest)
            _write(dst, writer, manifest, progress)
            _verify(dst, writer, manifest, progress)
            if fingerprint(src) != seen:
                raise CmxError(f"{src} was changed while it was converted: delete {dst} and run this again")
            _finish(src, dst, manifest, writer)
    return manifest, resumed


@contextmanager
def _disk(dst: Path) -> Iterator[None]:
    """Says in one line what the disk did."""
    try:
        yield
    except (OSError, RuntimeError) as error:  # RuntimeError: a symlink loop
        full = isinstance(error, OSError) and error.errno == errno.ENOSPC
        why = "the disk is full" if full else str(error)
        raise CmxError(f"{dst}: conversion broke off ({why}); run the same command to go on") from None


def _check_arguments(format: str, dtype: str | None, ranks: int | None) -> None:
    if format not in FORMATS:
        raise CmxError(f"format {format!r} is unknown, expected one of {', '.join(FORMATS)}")
    allowed = DTYPES if format == "safetensors" else ("float32", "bfloat16")
    if dtype is not None and dtype not in allowed:
        raise CmxError(f"dtype {dtype!r}, expected one of {', '.join(allowed)} for {format}")
    if ranks is not None and format != "orbax":
        raise CmxError("a layout is given, which only an Orbax directory has: use --format orbax")


def check_directories(src: Path, dst: Path) -> None:
    """Refuses a source that is no directory, and a destination that is a file or lies in the source.

    Raises:
      CmxError: so it is.
    """
    with _disk(dst):
        if not src.is_dir():
            raise CmxError(f"{src} is no directory, expected a checkpoint")
        if dst.exists() and not dst.is_dir():
            raise CmxError(f"{dst} is a file, expected a directory to write to")
        if dst.resolve() == src.resolve() or src.resolve() in dst.resolve().parents:
            raise CmxError(f"{dst} lies in the source, expected another directory")


def types(checkpoint: Checkpoint, dtype: str | None) -> tuple[str, frozenset[tuple[str, str]]]:
    """The type of most fields, and the fields that are float32 all the same.

    Without a wish nothing that is stored as floats loses a digit: what is stored in more than bfloat16 has
    stays float32; if that is most of the model, all is.
    """
    if dtype is not None:
        return dtype, frozenset()
    leaves = all_leaves(checkpoint.config, checkpoint.config.n_routed_experts, checkpoint.mtp)
    sizes: dict[tuple[str, str], int] = {
        (leaf.stack, leaf.path): math.prod(leaf.shape) for leaf in leaves if leaf.kind != "slots"
    }
    wide = sum(size for field, size in sizes.items() if field in checkpoint.wide)
    if 2 * wide > sum(sizes.values()):
        return "float32", frozenset()
    return "bfloat16", frozenset(field for field in checkpoint.wide if field in sizes)


def fingerprint(src: Path) -> str:
    """Names, sizes and times of what is converted, and the config itself."""
    digest = hashlib.sha256((src / "config.json").read_bytes() if (src / "config.json").is_file() else b"")
    for path in sorted((*src.glob("*"), *src.glob("units/**/*"))):
        counts = path.suffix == ".safetensors" or path.name.endswith(".index.json") or path.parent != src
        if path.is_file() and (counts or path.name in (NAME, DESCRIPTION)):
            state = path.stat()
            digest.update(f"{path.relative_to(src)} {state.st_size} {state.st_mtime_ns}\n".encode())
    return digest.hexdigest()


def _manifest(
    seen: str,
    checkpoint: Checkpoint,
    format: str,
    dtype: str,
    wide: frozenset[tuple[str, str]],
    layout: Layout,
) -> Manifest:
    orbax, experts = format == "orbax", checkpoint.config.n_routed_experts
    return Manifest(
        source=seen,
        format=format,
        dtype=dtype,
        wide=sorted("/".join(field) for field in wide),
        mtp=checkpoint.mtp,
        slots=layout.slots if orbax else 0,
        placement=layout.placement(experts).tolist() if orbax else [],
    )


def begun(dst: Path, source: str) -> Manifest | None:
    """What was begun in a destination; None where nothing was.

    Args:
      dst: the destination.
      source: of the manifest that is expected there.

    Raises:
      CmxError: it holds something else.
    """
    found = read_manifest(dst)
    if found is None and dst.is_dir() and any(path.name not in (UNFINISHED, LOCK) for path in dst.iterdir()):
        raise CmxError(f"{dst} is not empty and no conversion has begun there, expected a new directory")
    if found is not None and found.source != source:
        raise _another(dst)
    return found


def _another(dst: Path) -> CmxError:
    what = "another source, format, type, layout or calibration"
    return CmxError(f"{dst} holds another conversion ({what}): delete it, or take another directory")


def _begin(dst: Path, wanted: Manifest) -> None:
    """Makes the destination, unless this was begun there."""
    if begun(dst, wanted.source) is None:
        dst.mkdir(parents=True, exist_ok=True)
        wanted.save(dst)


@contextmanager
def _locked(dst: Path) -> Iterator[None]:
    """Holds a lock on the destination, which the system takes back from who is killed."""
    with (dst / LOCK).open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise CmxError(f"{dst}: another conversion is writing there, expected none") from None
        yield
        (dst / LOCK).unlink(missing_ok=True)


def _resumed(dst: Path, wanted: Manifest) -> Manifest:
    """The manifest to go on with."""
    found = read_manifest(dst)
    if found is None or not found.same_work(wanted):
        raise _another(dst)
    return found


def _writer(
    dst: Path, checkpoint: Checkpoint, manifest: Manifest, layout: Layout, wide: frozenset[tuple[str, str]]
) -> UnitWriter:
    reader = PieceReader(checkpoint)
    if manifest.format == "safetensors":
        return SafetensorsWriter(dst, reader, manifest.dtype, wide)
    from cmx_jax.model.checkpoint.orbax import OrbaxWriter  # takes a second to import

    return OrbaxWriter(dst, reader, layout, manifest.dtype, wide)


def _write(dst: Path, writer: UnitWriter, manifest: Manifest, progress: Callable[[str], None]) -> None:
    for number, unit in enumerate(writer.units):
        if unit not in manifest.units:
            progress(f"writing {unit} ({number + 1} of {len(writer.units)})")
            manifest.units[unit] = writer.write(unit)
            manifest.save(dst)


def _verify(dst: Path, writer: UnitWriter, manifest: Manifest, progress: Callable[[str], None]) -> None:
    """Reads everything again. What is wrong leaves the manifest, and the directory no longer loads."""
    wrong: dict[str, str] = {}
    for number, unit in enumerate(writer.units):
        progress(f"verifying {unit} ({number + 1} of {len(writer.units)})")
        expected = manifest.units[unit]
        try:
            found = writer.sums(unit)
        except CmxError as error:
            wrong[unit] = str(error)
            continue
        names = sorted(name for name in {*found, *expected} if found.get(name) != expected.get(name))
        if names:
            wrong[unit] = f"tensor {names[0]} reads back otherwise"
    if not wrong:
        return
    for unit in wrong:
        del manifest.units[unit]
    manifest.complete = False
    manifest.save(dst)
    (dst / "config.json").unlink(missing_ok=True)
    unit, why = next(iter(wrong.items()))
    more = f" and {len(wrong) - 1} more" if len(wrong) > 1 else ""
    raise CmxError(f"{dst}: {unit}{more} was written wrongly ({why}); run the same command to write it again")


def _finish(src: Path, dst: Path, manifest: Manifest, writer: UnitWriter) -> None:
    """Everything beside the weights; the config comes last."""
    for path in sorted(src.iterdir()):
        skipped = path.name in ("config.json", NAME, LOCK, DESCRIPTION, REPORT) or ".index.json" in path.name
        skipped = skipped or path.suffix in _WEIGHTS or not path.is_file()
        if not skipped and path.stat().st_size < _MOST_COPIED:
            shutil.copyfile(path, dst / path.name)
    if isinstance(writer, SafetensorsWriter):
        writer.write_index()
    config = written_config(read_json(src / "config.json"), manifest.dtype, _floats(writer))
    unfinished = dst / "config.json.unfinished"
    unfinished.write_text(json.dumps(config, indent=2) + "\n")
    unfinished.rename(dst / "config.json")
    manifest.complete = True
    manifest.save(dst)


def _floats(writer: UnitWriter) -> list[str]:
    """Modules of an INT8 checkpoint that are not INT8."""
    if not isinstance(writer, SafetensorsWriter):
        return []
    parts = [(unit, tensor[0]) for unit in writer.units.values() for tensor in unit.tensors]
    return sorted(s.name.removesuffix(".weight") for unit, s in parts if linear(s) and not unit.quantized(s))


def written_config(raw: dict[str, Any], dtype: str, floats: Iterable[str] = ()) -> dict[str, Any]:
    """The source's config, as a text model in the type that was written; `floats`: modules without INT8."""
    if "text_config" in raw:
        raw = {**raw["text_config"], "model_type": "llama4_text", "architectures": ["Llama4ForCausalLM"]}
    dropped = ("quantization_config", "compression_config", "quantize", "mla_quantize", "mtp_quantize")
    config = {key: value for key, value in raw.items() if key not in dropped}
    config["dtype" if "dtype" in config else "torch_dtype"] = "bfloat16" if dtype == "int8" else dtype
    if dtype == "int8":
        config["quantization_config"] = compressed_int8(floats)
    return config
