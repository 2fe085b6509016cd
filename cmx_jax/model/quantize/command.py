"""A checkpoint to INT8 (section 4.5), layer by layer: what `cmx quantize` does.

1. A first pass over the layers measures what rounding each field costs; the most sensitive stay in floats.
2. A second one transforms, rounds and writes each layer, and goes on as `cmx convert` does: what is killed
   continues behind the last layer written.

Both carry the calibration text's hidden states from layer to layer, in floats. Without a calibration text
weights are rounded as they are.
"""

import hashlib
import json
import math
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int

from cmx_jax.errors import CmxError
from cmx_jax.model.checkpoint import open_checkpoint
from cmx_jax.model.checkpoint.convert import begun, check_directories, fingerprint, run_conversion
from cmx_jax.model.checkpoint.manifest import REPORT, Manifest
from cmx_jax.model.checkpoint.safetensors import SafetensorsWriter
from cmx_jax.model.checkpoint.source import Checkpoint
from cmx_jax.model.checkpoint.writer import PieceReader, Unit
from cmx_jax.model.quantize.layer import PARTS
from cmx_jax.model.quantize.sensitivity import sensitivity
from cmx_jax.model.quantize.walk import Walk
from cmx_jax.model.weights import all_leaves, int8_fields
from cmx_jax.quant.sensitivity import keep_precision

BUDGET = 0.08  # of the INT8 bytes, for what stays in floats
THRESHOLD = 5e-4  # nats that rounding a field must cost at least for it to stay
MEASURED = 4  # sequences of the calibration text on which that is measured
FUSED = (  # servers that read such checkpoints make one matrix of each (vLLM), and refuse two kinds of it
    ("attn.q", "attn.k", "attn.v"),
    ("attn.q_a", "attn.kv_a"),
    ("ffn.experts.gate_up", "ffn.experts.down"),
)
Fields = frozenset[tuple[str, str]]


def quantize(
    source: str | Path,
    destination: str | Path,
    *,
    tokens: Int[np.ndarray, "B T"] | None = None,
    parts: frozenset[str] = frozenset(PARTS),
    budget: float = BUDGET,
    progress: Callable[[str], None] = lambda _: None,
) -> dict[str, Any]:
    """Writes a checkpoint's large matrices as INT8 (compressed-tensors), everything else as floats.

    Args:
      source: a checkpoint that loads.
      destination: a directory that is new, empty, or holds the beginning of this.
      tokens: calibration text; None rounds the weights as they are.
      parts: which of `PARTS` are done.
      budget: bytes that may be spent on precision, as a share of all INT8 bytes.
      progress: told what is being done.

    Returns:
      What was done; `sensitivity` has the cost of rounding each field alone, in nats, `layers` each matrix's
      error in W8A8, by rounding alone (`plain`) and as `written`, and the share of its channels that are
      `clipped`.

    Raises:
      CmxError: an argument or the source is refused, a number is not finite, the disk is full, or the
        destination holds something else.
    """
    src, dst = Path(source), Path(destination)
    if unknown := parts - set(PARTS):
        raise CmxError(f"part {sorted(unknown)[0]!r} is unknown, expected some of {', '.join(PARTS)}")
    if not budget >= 0:
        raise CmxError(f"budget is {budget}, expected 0 or more")
    parts = frozenset() if tokens is None else parts
    check_directories(src, dst)
    seen = fingerprint(src)
    checkpoint = open_checkpoint(src)
    work = hashlib.sha256(f"{seen} {sorted(parts)} {budget}".encode())
    if tokens is not None:
        work.update(f"{tokens.shape}".encode() + np.ascontiguousarray(tokens).tobytes())
    try:
        fields, costs = _fields(checkpoint, dst, work.hexdigest(), tokens, parts, budget, progress)
        wanted = Manifest(
            work.hexdigest(), "safetensors", "int8", [], checkpoint.mtp, 0, [], sorted(map("/".join, fields))
        )

        def writer(manifest: Manifest) -> SafetensorsWriter:
            walk = None if tokens is None else Walk(PieceReader(checkpoint), tokens, parts, fields)
            return Int8Writer(dst, PieceReader(checkpoint), fields, walk, costs)

        manifest, resumed = run_conversion(src, dst, seen, wanted, writer, progress)
    except ValueError as error:  # of the algorithms, which know matrices only
        raise CmxError(f"{src}: {error}") from None
    kept = sorted(map("/".join, int8_fields(checkpoint.config, checkpoint.mtp) - fields))
    report = json.loads((dst / REPORT).read_text()) if tokens is not None else {"layers": {}}
    return {
        "source": str(src),
        "destination": str(dst),
        "calibration_tokens": 0 if tokens is None else tokens.size,
        "parts": sorted(parts),
        "kept": kept,
        "units": len(manifest.units),
        "units_resumed": resumed,
        "bytes": sum(path.stat().st_size for path in dst.rglob("*") if path.is_file()),
        **report,
    }


def _fields(
    checkpoint: Checkpoint,
    dst: Path,
    work: str,
    tokens: Any,
    parts: frozenset[str],
    budget: float,
    progress: Callable[[str], None],
) -> tuple[Fields, dict[str, float]]:
    """What becomes INT8: as it was decided when this began, or everything but what measures worst.

    With it the measures, where they were taken now.
    """
    if (there := begun(dst, work)) is not None:
        return frozenset(tuple(name.split("/")) for name in there.int8), {}  # type: ignore[misc]
    possible = int8_fields(checkpoint.config, checkpoint.mtp)
    if "precision" not in parts:
        return possible, {}
    walk = Walk(PieceReader(checkpoint), tokens[:MEASURED], parts, possible)
    c = checkpoint.config
    leaves = [x for x in all_leaves(c, c.n_routed_experts) if (x.stack, x.path) in possible]
    sizes: Counter[str] = Counter()
    for leaf in leaves:
        sizes[_together(f"{leaf.stack}/{leaf.path}")] += math.prod(leaf.shape)
    costs, together = sensitivity(walk, progress), defaultdict[str, float](float)
    for name, cost in costs.items():
        together[_together(name)] += cost
    kept = keep_precision(together, sizes, budget, threshold=THRESHOLD)
    return frozenset(field for field in possible if _together("/".join(field)) not in kept), costs


def _together(field: str) -> str:
    """The first of the fields of which this one is of one precision."""
    stack, _, path = field.partition("/")
    return f"{stack}/{next((paths[0] for paths in FUSED if path in paths), path)}"


class Int8Writer(SafetensorsWriter):
    """Writes units of which the calibrated fields are INT8."""

    def __init__(
        self, directory: Path, reader: PieceReader, int8: Fields, walk: Walk | None, costs: dict[str, float]
    ):
        moved = ("attn_norm", "ffn_norm", "attn.q_norm", "attn.kv_norm", "ffn.router")  # by scales
        wide = frozenset((stack, path) for stack in ("dense", "moe", "mtp") for path in moved)
        super().__init__(directory, reader, "int8", wide if walk else frozenset(), int8)
        self.walk, self.costs = walk, costs

    def arrays(self, unit: Unit) -> Iterator[tuple[str, np.ndarray]]:
        """The tensors of a unit."""
        if self.walk is None or unit.name == "top":
            yield from super().arrays(unit)
            return
        number = int(unit.name.removeprefix("layers."))
        rows = yield from self.walk.tensors(number, unit)
        path = self.directory / REPORT
        report: dict[str, Any] = {"sensitivity": self.costs, "layers": {}}
        if path.exists():
            report = json.loads(path.read_text())
        report["layers"][unit.name] = rows
        unfinished = path.with_name(path.name + ".unfinished")
        unfinished.write_text(json.dumps(report, indent=1) + "\n")
        unfinished.rename(path)
