"""Quantisation of a checkpoint to INT8 (section 4.5), layer by layer: the work of `cmx quantize`.

1. A first pass over the layers measures the cost of rounding each field; the most sensitive stay in floats.
2. A second pass transforms, rounds and writes each layer. It resumes as `cmx convert` does: after a kill it
   continues after the last layer written.

Both passes carry the calibration text's hidden states from layer to layer, in floats. Without a calibration
text weights are rounded as they are.
"""

import hashlib
import math
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int

from cmx_jax.errors import CmxError
from cmx_jax.model.checkpoint import open_checkpoint
from cmx_jax.model.checkpoint.manifest import Manifest
from cmx_jax.model.checkpoint.resume import (
    check_directories,
    existing_manifest,
    fingerprint,
    run_conversion,
    total_bytes,
)
from cmx_jax.model.checkpoint.safetensors import SafetensorsWriter
from cmx_jax.model.checkpoint.source import Checkpoint
from cmx_jax.model.checkpoint.writer import PieceReader, Unit
from cmx_jax.model.quantize.layer import PARTS
from cmx_jax.model.quantize.report import MatrixError, Report, read_report
from cmx_jax.model.quantize.sensitivity import sensitivity
from cmx_jax.model.quantize.walk import Walk
from cmx_jax.model.weights import all_leaves, int8_fields
from cmx_jax.quant.mixed_precision import keep_precision

BUDGET = 0.08  # share of the INT8 bytes that may be spent on fields in floats
THRESHOLD = 5e-4  # nats; a field stays in floats only if rounding it costs at least as much
MEASURED = 4  # sequences of the calibration text on which that cost is measured
FUSED = (  # groups that servers of such checkpoints fuse to one matrix (vLLM), and refuse with two types
    ("attn.q", "attn.k", "attn.v"),
    ("attn.q_a", "attn.kv_a"),
    ("ffn.experts.gate_up", "ffn.experts.down"),
)
Fields = frozenset[tuple[str, str]]


@dataclass(frozen=True)
class Quantization:
    """Result of a quantisation.

    Attributes:
      source: Directory that was quantised.
      destination: Directory that was written.
      calibration_tokens: Number of tokens of the calibration text; 0 without one.
      parts: Parts of section 4.5 that were applied, from `PARTS`.
      kept: Fields (`stack/path`) that could be INT8 and stay in floats.
      units: Number of units in the destination.
      units_resumed: Number of units that an earlier run had written.
      bytes: Bytes of all files in the destination.
      layers: Errors by unit and path of the matrix; empty without a calibration text.
      sensitivity: Cost of rounding a field alone, in nats, by field; None without a calibration text.
    """

    source: str
    destination: str
    calibration_tokens: int
    parts: list[str]
    kept: list[str]
    units: int
    units_resumed: int
    bytes: int
    layers: dict[str, dict[str, MatrixError]]
    sensitivity: dict[str, float] | None

    def as_dict(self) -> dict[str, object]:
        """The result as a JSON object, without `sensitivity` if there was no calibration text."""
        document = asdict(self)
        layers, costs = document.pop("layers"), document.pop("sensitivity")
        return document | ({} if costs is None else {"sensitivity": costs}) | {"layers": layers}


def quantize(
    source: str | Path,
    destination: str | Path,
    *,
    tokens: Int[np.ndarray, "B T"] | None = None,
    parts: frozenset[str] = frozenset(PARTS),
    budget: float = BUDGET,
    progress: Callable[[str], None] = lambda _: None,
) -> Quantization:
    """Writes a checkpoint's large matrices as INT8 (compressed-tensors), everything else as floats.

    Args:
      source: Directory of a checkpoint that loads.
      destination: Directory that is new, empty, or holds the beginning of this quantisation.
      tokens: Calibration text; None rounds the weights as they are.
      parts: Parts of section 4.5 to apply, from `PARTS`.
      budget: Bytes that may be spent on precision, as a share of all INT8 bytes.
      progress: Callback for one line about the current action.

    Raises:
      CmxError: An argument or the source is refused, a number is not finite, the disk is full, or the
        destination holds something else.
    """
    src, dst = Path(source), Path(destination)
    if unknown := parts - set(PARTS):
        raise CmxError(f"part {sorted(unknown)[0]!r} is unknown, expected some of {', '.join(PARTS)}")
    if not budget >= 0:
        raise CmxError(f"budget is {budget}, expected 0 or more")
    parts = frozenset() if tokens is None else parts
    check_directories(src, dst)
    src_fingerprint = fingerprint(src)
    checkpoint = open_checkpoint(src)
    work = _work(src_fingerprint, parts, budget, tokens)
    try:
        fields, costs = _choose_fields(checkpoint, dst, work, tokens, parts, budget, progress)

        def writer(_: Manifest) -> SafetensorsWriter:
            walk = None if tokens is None else Walk(PieceReader(checkpoint), tokens, parts, fields)
            return Int8Writer(dst, PieceReader(checkpoint), fields, walk, costs)

        plan = _manifest(work, checkpoint, fields)
        manifest, resumed = run_conversion(src, dst, src_fingerprint, plan, writer, progress)
    except CmxError:  # a ValueError too, which names its file already
        raise
    except ValueError as error:  # from the algorithms, which know matrices only
        raise CmxError(f"{src}: {error}") from None
    report = (None if tokens is None else read_report(dst)) or Report()
    return Quantization(
        source=str(src),
        destination=str(dst),
        calibration_tokens=0 if tokens is None else tokens.size,
        parts=sorted(parts),
        kept=sorted(map("/".join, int8_fields(checkpoint.config, checkpoint.mtp) - fields)),
        units=len(manifest.units),
        units_resumed=resumed,
        bytes=total_bytes(dst),
        layers=report.layers,
        sensitivity=None if tokens is None else report.sensitivity,
    )


def _work(
    src_fingerprint: str, parts: frozenset[str], budget: float, tokens: Int[np.ndarray, "B T"] | None
) -> str:
    """Fingerprint of all that decides the result."""
    work = hashlib.sha256(f"{src_fingerprint} {sorted(parts)} {budget}".encode())
    if tokens is not None:
        work.update(f"{tokens.shape}".encode() + np.ascontiguousarray(tokens).tobytes())
    return work.hexdigest()


def _manifest(work: str, checkpoint: Checkpoint, fields: Fields) -> Manifest:
    return Manifest(
        source=work,
        format="safetensors",
        dtype="int8",
        wide=[],
        mtp=checkpoint.mtp,
        slots=0,
        placement=[],
        int8=sorted(map("/".join, fields)),
    )


def _choose_fields(
    checkpoint: Checkpoint,
    dst: Path,
    work: str,
    tokens: Any,
    parts: frozenset[str],
    budget: float,
    progress: Callable[[str], None],
) -> tuple[Fields, dict[str, float]]:
    """The fields that become INT8: those of an earlier run, else all but the most sensitive ones.

    Returns:
      The fields, and the cost of each field in nats, empty unless it was measured now.
    """
    if (manifest := existing_manifest(dst, work)) is not None:
        return frozenset(tuple(name.split("/")) for name in manifest.int8), {}  # type: ignore[misc]
    possible = int8_fields(checkpoint.config, checkpoint.mtp)
    if "precision" not in parts:
        return possible, {}
    walk = Walk(PieceReader(checkpoint), tokens[:MEASURED], parts, possible)
    c = checkpoint.config
    leaves = [x for x in all_leaves(c, c.n_routed_experts) if (x.stack, x.path) in possible]
    sizes: Counter[str] = Counter()
    for leaf in leaves:
        sizes[_fused(f"{leaf.stack}/{leaf.path}")] += math.prod(leaf.shape)
    costs, fused_costs = sensitivity(walk, progress), defaultdict[str, float](float)
    for name, cost in costs.items():
        fused_costs[_fused(name)] += cost
    kept = keep_precision(fused_costs, sizes, budget, threshold=THRESHOLD)
    return frozenset(field for field in possible if _fused("/".join(field)) not in kept), costs


def _fused(field: str) -> str:
    """The first of the fields that are fused with a field, and so have its type."""
    stack, _, path = field.partition("/")
    return f"{stack}/{next((paths[0] for paths in FUSED if path in paths), path)}"


class Int8Writer(SafetensorsWriter):
    """Writes units whose calibrated fields are INT8."""

    def __init__(
        self, directory: Path, reader: PieceReader, int8: Fields, walk: Walk | None, costs: dict[str, float]
    ):
        scaled = ("attn_norm", "ffn_norm", "attn.q_norm", "attn.kv_norm", "ffn.router")  # absorb scales
        wide = frozenset((stack, path) for stack in ("dense", "moe", "mtp") for path in scaled)
        super().__init__(directory, reader, "int8", wide if walk else frozenset(), int8)
        self.walk, self.costs = walk, costs

    def arrays(self, unit: Unit) -> Iterator[tuple[str, np.ndarray]]:
        """Yields the tensors of a unit; then its errors are in the report."""
        if self.walk is None or unit.name == "top":
            yield from super().arrays(unit)
            return
        number = int(unit.name.removeprefix("layers."))
        errors = yield from self.walk.tensors(number, unit)
        report = read_report(self.directory) or Report(self.costs)
        report.layers[unit.name] = errors
        report.save(self.directory)
