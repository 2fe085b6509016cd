"""Shared by the tests of quantising: parts, a calibration text, a run."""

from pathlib import Path
from typing import Any

import numpy as np

from cmx_jax.model.quantize.command import Quantization, quantize

FOLDED = frozenset({"rotation", "scales"})
ROUNDED = FOLDED | {"clipping", "compensation"}
TEXT = np.random.default_rng(0).integers(0, 60, (6, 32))


def run(source: Path, out: Path, parts: frozenset[str] = ROUNDED, **options: Any) -> Quantization:
    return quantize(source, out, tokens=TEXT, parts=parts, **options)


def files(directory: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in directory.iterdir() if p.name != "conversion.lock"}
