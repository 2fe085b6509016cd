"""Calibration text for quantisation: windows of a file, or of the documentation that ships with Python."""

from pathlib import Path

import numpy as np
from jaxtyping import Int

from cmx_jax.analysis.eval.corpus import documents, split
from cmx_jax.analysis.eval.heldout_text import Text, read_text, windows
from cmx_jax.errors import CmxError
from cmx_jax.serving.deploy.model import Model

WINDOW = 256


def calibration(model: Model, path: str | Path | None, tokens: int) -> Int[np.ndarray, "B T"]:
    """Token ids of windows that are spread evenly over a text.

    Args:
      model: Model whose tokenizer is used.
      path: UTF-8 file; None: Python's documentation, without the part that `cmx eval` holds out.
      tokens: Approximate number of tokens, at least one window.

    Raises:
      CmxError: The text does not exist, is empty, is not UTF-8, or is shorter than a window.
    """
    length = min(WINDOW, model.config.max_position_embeddings)
    if tokens < length:
        raise CmxError(f"{tokens} calibration tokens, expected at least a window of {length}")
    text = Text("Python's documentation", split(documents())[0]) if path is None else read_text(path)
    rows = windows(model, text, length)
    count = min(tokens // length, len(rows))
    return rows[np.linspace(0, len(rows) - 1, count).astype(int)]
