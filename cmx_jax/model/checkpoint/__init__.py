"""Checkpoints: found, checked, read piece by piece, written, converted.

`open_checkpoint` takes a Hugging Face directory or one that `cmx convert --format orbax` wrote; both give
*pieces*, our field of one layer (and expert), and everything else is built on those.
"""

from cmx_jax.model.checkpoint.load import load_weights, open_checkpoint, read_weights
from cmx_jax.model.checkpoint.writer import write_weights

__all__ = ["load_weights", "open_checkpoint", "read_weights", "write_weights"]
