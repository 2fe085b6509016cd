"""Conversion: any checkpoint that loads to safetensors or Orbax, layer by layer.

1. Open SRC: everything is there and understood, or it is refused.
2. Each layer is written to a name of its own, then entered in `conversion.json` with a sha256 of each tensor.
   What is killed goes on behind the last layer entered.
3. Everything is read again and summed. Only then the directory gets its config, so that it loads.
"""

import errno
import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from cmx_jax.errors import CmxError
from cmx_jax.mesh.layout import Layout, expert_parallel
from cmx_jax.model.checkpoint.declared import DESCRIPTION, compressed_int8
from cmx_jax.model.checkpoint.huggingface import HuggingFace
from cmx_jax.model.checkpoint.load import Checkpoint, open_checkpoint
from cmx_jax.model.checkpoint.manifest import NAME, Manifest, read_manifest
from cmx_jax.model.checkpoint.safetensors import SafetensorsWriter
from cmx_jax.model.checkpoint.writer import DTYPES, PieceReader
from cmx_jax.model.fields import read_json

FORMATS = ("safetensors", "orbax")
_MOST_COPIED = 256 << 20  # larger than any tokenizer


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
      dtype: `bfloat16`, `float32`, or `int8` (compressed-tensors; safetensors only); None keeps what is
        stored,
        bfloat16 for what is quantised.
      ranks: expert-parallel ranks of the layout that an Orbax directory is written for; None is one.
      progress: told what is being done.

    Returns:
      What was done: units, tensors and bytes, and how many units were there already.

    Raises:
      CmxError: source or arguments are refused, the destination holds something else, the disk is full, or
        what
        was written does not read back as it was.
    """
    src, dst = Path(source), Path(destination)
    _check_arguments(src, dst, format, dtype, ranks)
    progress("checking the source")
    checkpoint = open_checkpoint(src)
    kind = dtype or stored_dtype(checkpoint)
    layout = expert_parallel(1 if ranks is None else ranks, checkpoint.config.n_routed_experts)
    manifest = _manifest(src, checkpoint, format, kind, layout if format == "orbax" else None)
    manifest = _begin(dst, manifest)
    resumed = len(manifest.units)
    try:
        writer = _writer(dst, checkpoint, format, kind, layout)
        for number, unit in enumerate(writer.units):
            if unit not in manifest.units:
                progress(f"writing {unit} ({number + 1} of {len(writer.units)})")
                manifest.units[unit] = writer.write(unit)
                manifest.save(dst)
        _verify(dst, writer, manifest, progress)
        _finish(src, dst, checkpoint, manifest, writer)
    except OSError as error:
        why = "the disk is full" if error.errno == errno.ENOSPC else error.strerror
        raise CmxError(f"{dst}: cannot be written ({why}); run the same command to go on") from None
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


def _check_arguments(src: Path, dst: Path, format: str, dtype: str | None, ranks: int | None) -> None:
    if format not in FORMATS:
        raise CmxError(f"format {format!r} is unknown, expected one of {', '.join(FORMATS)}")
    allowed = DTYPES if format == "safetensors" else ("float32", "bfloat16")
    if dtype is not None and dtype not in allowed:
        raise CmxError(f"dtype {dtype!r}, expected one of {', '.join(allowed)} for {format}")
    if ranks is not None and format != "orbax":
        raise CmxError("a layout is given, which only an Orbax directory has: use --format orbax")
    if not src.is_dir():
        raise CmxError(f"{src} is no directory, expected a checkpoint")
    if dst.exists() and not dst.is_dir():
        raise CmxError(f"{dst} is a file, expected a directory to write to")
    if dst.resolve() == src.resolve() or src.resolve() in dst.resolve().parents:
        raise CmxError(f"{dst} lies in the source, expected another directory")


def stored_dtype(checkpoint: Checkpoint) -> str:
    """The type that loses nothing of plain tensors: bfloat16 of BF16 and of quantised ones, else float32."""
    if not isinstance(checkpoint, HuggingFace):
        return str(getattr(checkpoint, "dtype", "float32"))
    wide = any(
        checkpoint.stored[s.name].scheme in ("F32", "F16")
        for s in checkpoint.sources
        if len(s.shape) == 2 and s.piece[1] != "ffn.router"
    )
    return "float32" if wide else "bfloat16"


def _manifest(src: Path, checkpoint: Checkpoint, format: str, dtype: str, layout: Layout | None) -> Manifest:
    digest = hashlib.sha256((src / "config.json").read_bytes())
    for path in sorted(p for p in src.rglob("*") if p.is_file()):
        digest.update(f"{path.relative_to(src)} {path.stat().st_size} {path.stat().st_mtime_ns}\n".encode())
    experts = checkpoint.config.n_routed_experts
    placement = layout.placement(experts).tolist() if layout else []
    return Manifest(
        digest.hexdigest(), format, dtype, checkpoint.mtp, layout.slots if layout else 0, placement
    )


def _begin(dst: Path, wanted: Manifest) -> Manifest:
    """The manifest to go on with: the one that is there if it is of the same work."""
    found = read_manifest(dst)
    if found is None:
        if dst.is_dir() and any(dst.iterdir()):
            raise CmxError(f"{dst} is not empty and no conversion has begun there, expected a new directory")
        try:
            dst.mkdir(parents=True, exist_ok=True)
            wanted.save(dst)
        except OSError as error:
            raise CmxError(f"{dst}: cannot be written ({error.strerror})") from None
        return wanted
    if not found.same_work(wanted):
        what = "another source, format, type or layout"
        raise CmxError(f"{dst} holds another conversion ({what}): delete it, or take another directory")
    return found


def _writer(dst: Path, checkpoint: Checkpoint, format: str, dtype: str, layout: Layout) -> UnitWriter:
    reader = PieceReader(checkpoint)
    if format == "safetensors":
        return SafetensorsWriter(dst, reader, dtype)
    from cmx_jax.model.checkpoint.orbax import OrbaxWriter  # takes a second to import

    return OrbaxWriter(dst, reader, layout, dtype)


def _verify(dst: Path, writer: UnitWriter, manifest: Manifest, progress: Callable[[str], None]) -> None:
    for number, unit in enumerate(writer.units):
        progress(f"verifying {unit} ({number + 1} of {len(writer.units)})")
        expected = manifest.units[unit]
        try:
            found = writer.sums(unit)
        except CmxError as error:
            found, why = {}, str(error)
        else:
            why = next(
                (f"tensor {n} reads back otherwise" for n in expected if found.get(n) != expected[n]), ""
            )
        if found != expected:
            del manifest.units[unit]
            manifest.complete = False
            manifest.save(dst)
            raise CmxError(
                f"{dst}: {unit} was written wrongly ({why}); run the same command to write it again"
            )


def _finish(src: Path, dst: Path, checkpoint: Checkpoint, manifest: Manifest, writer: UnitWriter) -> None:
    """Everything beside the weights; the config comes last."""
    skipped = ("config.json", NAME, DESCRIPTION)
    for path in sorted(src.iterdir()):
        weights = path.suffix in (".safetensors", ".bin", ".pt", ".pth") or ".index.json" in path.name
        if path.is_file() and path.name not in skipped and not weights and path.stat().st_size < _MOST_COPIED:
            shutil.copyfile(path, dst / path.name)
    if isinstance(writer, SafetensorsWriter):
        writer.write_index()
    config = written_config(read_json(src / "config.json"), manifest.dtype)
    unfinished = dst / "config.json.unfinished"
    unfinished.write_text(json.dumps(config, indent=2) + "\n")
    unfinished.rename(dst / "config.json")
    manifest.complete = True
    manifest.save(dst)


def written_config(raw: dict[str, Any], dtype: str) -> dict[str, Any]:
    """The source's config, as a text model in the type that was written."""
    if "text_config" in raw:
        raw = {**raw["text_config"], "model_type": "llama4_text", "architectures": ["Llama4ForCausalLM"]}
    dropped = ("quantization_config", "compression_config", "quantize", "mla_quantize", "mtp_quantize")
    config = {key: value for key, value in raw.items() if key not in dropped}
    config["dtype" if "dtype" in config else "torch_dtype"] = "bfloat16" if dtype == "int8" else dtype
    if dtype == "int8":
        config["quantization_config"] = compressed_int8()
    return config
