"""Text by which a model is quantised: windows of a file, or of the documentation that ships with Python."""

from pathlib import Path

import numpy as np
from jaxtyping import Int

from cmx_jax.analysis.eval.corpus import documents, split
from cmx_jax.analysis.eval.text import Text, read_text, windows
from cmx_jax.errors import CmxError
from cmx_jax.serving.deploy.model import Model

WINDOW = 256


def calibration(model: Model, path: str | Path | None, tokens: int) -> Int[np.ndarray, "B T"]:
    """About so many tokens, in windows spread evenly over a text.

    Args:
      model: whose tokens.
      path: a UTF-8 file; None: Python's documentation, without what `cmx eval` holds out.
      tokens: how many, at least a window.

    Raises:
      CmxError: the text is not there, empty, not UTF-8, or shorter than a window.
    """
    length = min(WINDOW, model.config.max_position_embeddings)
    if tokens < length:
        raise CmxError(f"{tokens} calibration tokens, expected at least a window of {length}")
    text = Text("Python's documentation", split(documents())[0]) if path is None else read_text(path)
    every = windows(model, text, length)
    count = min(tokens // length, len(every))
    return every[np.linspace(0, len(every) - 1, count).astype(int)]
