"""Checkpoints: opened, checked, read piece by piece, written, converted.

`open_checkpoint` takes a Hugging Face directory or one that `cmx convert --format orbax` wrote. Both give
*pieces* (a field of this package in one layer, and for one expert), and everything else is built on those.

    source.py       the interface of all formats: pieces, also as INT8
    names.py        each family's tensors by Hugging Face's names, and the pieces that they make
    tensor_files.py safetensors files as one mapping from name to array
    faults.py       faults as lines for people
    declared.py     the quantisation that a directory announces
    schemes.py      the forms in which a tensor is stored, and their decoding
    huggingface.py  a Hugging Face directory as a source of pieces
    orbax.py        an Orbax directory: writer, and source of pieces
    writer.py       tensors and files of a Hugging Face directory; safetensors.py writes all of its units
    load.py         opens a checkpoint, and loads weights onto an instance
    resume.py       writes and verifies units so that a run can be resumed, by manifest.py
    convert.py      `cmx convert`; inspect.py is `cmx inspect`
"""

from cmx_jax.model.checkpoint.load import load_weights, open_checkpoint, read_weights
from cmx_jax.model.checkpoint.writer import write_weights

__all__ = ["load_weights", "open_checkpoint", "read_weights", "write_weights"]
