"""Conversion of any checkpoint that loads to safetensors or Orbax, layer by layer.

The source is opened first: it is refused unless all of it is there and understood. Then it is written unit by
unit, verified, and made loadable, as `cmx_jax.model.checkpoint.resume` describes.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from cmx_jax.errors import CmxError
from cmx_jax.mesh.layout import Layout, expert_parallel
from cmx_jax.model.checkpoint.load import open_checkpoint
from cmx_jax.model.checkpoint.manifest import FORMATS, Manifest
from cmx_jax.model.checkpoint.resume import (
    UnitWriter,
    check_directories,
    fingerprint,
    run_conversion,
    total_bytes,
)
from cmx_jax.model.checkpoint.safetensors import SafetensorsWriter
from cmx_jax.model.checkpoint.source import Checkpoint
from cmx_jax.model.checkpoint.writer import DTYPES, PieceReader
from cmx_jax.model.weights import all_leaves


@dataclass(frozen=True)
class Conversion:
    """Result of a conversion.

    Attributes:
      source: Directory that was converted.
      destination: Directory that was written.
      format: `safetensors` or `orbax`.
      dtype: Type of most tensors: `float32`, `bfloat16` or `int8`.
      units: Number of units in the destination.
      units_resumed: Number of units that an earlier run had written.
      tensors: Number of tensors in the destination.
      bytes: Bytes of all files in the destination.
      verified: True: every tensor was read again and its sha256 compared.
    """

    source: str
    destination: str
    format: str
    dtype: str
    units: int
    units_resumed: int
    tensors: int
    bytes: int
    verified: bool = True


def convert(
    source: str | Path,
    destination: str | Path,
    *,
    format: str = "safetensors",
    dtype: str | None = None,
    ranks: int | None = None,
    progress: Callable[[str], None] = lambda _: None,
) -> Conversion:
    """Converts a checkpoint. The same call resumes a conversion that was interrupted.

    Args:
      source: Hugging Face or Orbax directory.
      destination: Directory that is new, empty, or holds the beginning of this conversion.
      format: `safetensors` or `orbax`.
      dtype: `bfloat16`, `float32`, or `int8` (compressed-tensors; safetensors only). None keeps all digits
        of tensors stored as floats, and gives bfloat16 for quantised ones.
      ranks: Number of expert-parallel ranks of the layout that an Orbax directory is written for; None
        means 1.
      progress: Callback for one line about the current action.

    Raises:
      CmxError: Source or arguments are refused, the destination holds something else, the disk is full, the
        source changed during the conversion, or a written tensor does not read back as it was.
    """
    src, dst = Path(source), Path(destination)
    check_directories(src, dst)
    _check_arguments(format, dtype, ranks)
    progress("checking the source")
    src_fingerprint = fingerprint(src)
    checkpoint = open_checkpoint(src)
    dtype, wide = _output_types(checkpoint, dtype)
    layout = expert_parallel(1 if ranks is None else ranks, checkpoint.config.n_routed_experts)
    plan = _manifest(src_fingerprint, checkpoint, format, dtype, wide, layout)

    def writer(manifest: Manifest) -> UnitWriter:
        return _writer(dst, checkpoint, manifest, layout, wide)

    manifest, resumed = run_conversion(src, dst, src_fingerprint, plan, writer, progress)
    return Conversion(
        source=str(src),
        destination=str(dst),
        format=format,
        dtype=dtype,
        units=len(manifest.units),
        units_resumed=resumed,
        tensors=sum(len(sums) for sums in manifest.units.values()),
        bytes=total_bytes(dst),
    )


def _check_arguments(format: str, dtype: str | None, ranks: int | None) -> None:
    if format not in FORMATS:
        raise CmxError(f"format {format!r} is unknown, expected one of {', '.join(FORMATS)}")
    allowed = DTYPES if format == "safetensors" else ("float32", "bfloat16")
    if dtype is not None and dtype not in allowed:
        raise CmxError(f"dtype {dtype!r}, expected one of {', '.join(allowed)} for {format}")
    if ranks is not None and format != "orbax":
        raise CmxError("a layout is given, which only an Orbax directory has: use --format orbax")


def _output_types(checkpoint: Checkpoint, dtype: str | None) -> tuple[str, frozenset[tuple[str, str]]]:
    """Type of most fields, and the fields that are float32 nevertheless.

    If `dtype` is None, floats keep their precision: fields stored in more digits than bfloat16 has stay
    float32. If those are most of the model, all of it is float32.
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


def _manifest(
    src_fingerprint: str,
    checkpoint: Checkpoint,
    format: str,
    dtype: str,
    wide: frozenset[tuple[str, str]],
    layout: Layout,
) -> Manifest:
    orbax, experts = format == "orbax", checkpoint.config.n_routed_experts
    return Manifest(
        source=src_fingerprint,
        format=format,
        dtype=dtype,
        wide=sorted("/".join(field) for field in wide),
        mtp=checkpoint.mtp,
        slots=layout.slots if orbax else 0,
        placement=layout.placement(experts).tolist() if orbax else [],
    )


def _writer(
    dst: Path, checkpoint: Checkpoint, manifest: Manifest, layout: Layout, wide: frozenset[tuple[str, str]]
) -> UnitWriter:
    reader = PieceReader(checkpoint)
    if manifest.format == "safetensors":
        return SafetensorsWriter(dst, reader, manifest.dtype, wide)
    from cmx_jax.model.checkpoint.orbax import OrbaxWriter  # takes a second to import

    return OrbaxWriter(dst, reader, layout, manifest.dtype, wide)
