"""A Hugging Face directory: `config.json` and `*.safetensors`, in any storage scheme of `schemes.py`."""

import logging
import re
from collections import defaultdict
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from cmx_jax.errors import CmxError
from cmx_jax.model.checkpoint.declared import DESCRIPTION, Declared, declared
from cmx_jax.model.checkpoint.faults import grouped
from cmx_jax.model.checkpoint.names import Piece, Source, sources
from cmx_jax.model.checkpoint.schemes import Stored, plain, stored
from cmx_jax.model.checkpoint.tensor_files import FLOATS, Header, TensorFiles, fill_finite, finite
from cmx_jax.model.config import ModelConfig
from cmx_jax.model.families import read_config
from cmx_jax.model.fields import read_json

log = logging.getLogger(__name__)
_COPIES = (
    "embed_tokens.weight",
    "shared_head.head.weight",
)  # the main model's, in an MTP layer
_MTP_ONLY = (".eh_proj.weight", ".enorm.weight", ".hnorm.weight", ".shared_head.norm.weight")
_SAMPLE = 256  # rows compared at both ends and in the middle

# Prefixes of the text model in a multimodal directory; transformers has used both orders.
_PREFIXES = {"language_model.model.": "model.", "model.language_model.": "model.", "language_model.": ""}


def text_name(name: str) -> str:
    """Name of a tensor without the prefix of the text model in a multimodal directory."""
    prefix = next((p for p in _PREFIXES if name.startswith(p)), "")
    return _PREFIXES.get(prefix, "") + name.removeprefix(prefix)


_OTHER_MODELS = (
    "vision_model.",
    "multi_modal_projector.",
    "model.vision_model.",
    "model.multi_modal_projector.",
)


class HuggingFace:
    """A Hugging Face directory as a `cmx_jax.model.checkpoint.source.Checkpoint`.

    Files and config are compared when it is made, but faults are refused only by `check`.

    Attributes:
      directory: Directory of the checkpoint.
      config: Config of the model.
      files: Tensors in the files.
      mtp: True if MTP layers are stored.
      stored: Storage scheme of each tensor that the config asks for and the files hold, by name.
      missing: Names of tensors that the config asks for and the files lack.
      unknown: Names of tensors that the config does not ask for.
      faults: Other faults, a line each.
      notes: Sentences on tensors that are stored and not used.
    """

    def __init__(self, directory: Path, config: ModelConfig | None = None):
        path = directory / "config.json"
        raw = read_json(path) if config is None or path.is_file() else {}
        self.directory = directory
        self.config = read_config(directory) if config is None else config
        announced = declared(raw, directory)
        self.files = TensorFiles(directory)
        self._strip_prefixes()
        self.mtp = _has_mtp(self.config, self.files)
        self.stored: dict[str, Stored] = {}
        self.missing: list[str] = []
        self.notes: list[str] = []
        self.faults = [
            f"tensor {name} is described in {DESCRIPTION}, but not there"
            for name in announced.ascend
            if name not in self.files and text_name(name) not in self.files
        ]
        for s in self.sources:
            if s.name not in self.stored:
                self._find(s, announced)
        self.missing = sorted(set(self.missing))
        unused = self._without_extra_layers(self._unused())
        self.unknown = sorted(name for name in unused if not self._ignored(name))

    @cached_property
    def sources(self) -> list[Source]:
        """Every tensor that the config asks for."""
        return list(sources(self.config, self.mtp))

    @cached_property
    def wide(self) -> frozenset[tuple[str, str]]:
        """Fields with at least one tensor stored in more digits than bfloat16 has."""
        return frozenset(
            s.piece[:2]
            for s in self.sources
            if s.name in self.stored and self.stored[s.name].scheme in ("F32", "F16")
        )

    @cached_property
    def int8(self) -> tuple[frozenset[tuple[str, str]], str]:
        """See `cmx_jax.model.checkpoint.source.Checkpoint`."""
        tensors = [(s.piece[:2], self.stored[s.name]) for s in self.sources if s.name in self.stored]
        rounded = {field for field, tensor in tensors if tensor.channels}
        floats = {field for field, tensor in tensors if not tensor.channels}
        scales = {self.files.headers[tensor.companions[0]].dtype for _, tensor in tensors if tensor.channels}
        return frozenset(rounded - floats), "bfloat16" if scales <= {"BF16"} else "float32"

    @cached_property
    def _pieces(self) -> dict[Piece, list[Source]]:
        pieces: dict[Piece, list[Source]] = defaultdict(list)
        for s in self.sources:
            pieces[s.piece].append(s)
        return pieces

    def check(self) -> "HuggingFace":
        """Checks that the directory holds just the tensors that the config asks for; returns self.

        Raises:
          CmxError: A tensor is missing, unknown or faulty; the first one is named.
        """
        for fault in grouped(self.faults):
            raise CmxError(fault)
        for fault, names in (
            ("is missing", self.missing),
            ("is not part of this architecture", self.unknown),
        ):
            if names:
                count = f" (and {len(names) - 1} more)" if len(names) > 1 else ""
                raise CmxError(f"{self.directory}: tensor {names[0]} {fault}{count}")
        for note in self.notes:
            log.warning("%s: %s", self.directory, note)
        return self

    def fill(self, piece: Piece, out: np.ndarray) -> None:
        """Writes a piece into `out`, which has the piece's shape and the requested type.

        Raises:
          CmxError: A number or scale is not finite.
        """
        for s in self._pieces[piece]:
            tensor = self.stored[s.name]
            fill_finite(out[s.part], s.view(tensor.decode()), f"tensor {tensor.name}")

    def fill_int8(self, piece: Piece, q: np.ndarray, scale: np.ndarray) -> bool:
        """See `cmx_jax.model.checkpoint.source.Checkpoint`."""
        for s in self._pieces[piece]:
            channels = self.stored[s.name].channels
            if channels is None:
                return False
            numbers, factors = channels()
            q[s.part] = s.view(numbers)
            scale[s.part] = s.view(np.broadcast_to(factors, numbers.shape))
        return True

    def tensor(self, name: str, dtype: Any) -> np.ndarray:
        """Reads and decodes a tensor of the file format, experts one by one.

        Raises:
          CmxError: A number or scale is not finite.
        """
        tensor = self.stored[name]
        return finite(tensor.decode(), dtype, f"tensor {tensor.name}")

    def _strip_prefixes(self) -> None:
        """Renames the tensors of a multimodal directory to those of a text model."""
        if self.config.family != "llama4":
            return
        headers: dict[str, Header] = {}
        for name, header in self.files.headers.items():
            short = text_name(name)
            if short in headers:
                raise CmxError(
                    f"{self.directory}: tensor {short} is there with and without a prefix: which is meant?"
                )
            headers[short] = header
        self.files.headers = headers

    def _find(self, s: Source, announced: Declared) -> None:
        """Looks up a source and records its storage scheme, or its fault."""
        stacked = None if s.name in self.files else s.stacked
        one, expected = (stacked.name, stacked.shape) if stacked else (s.name, s.shape)
        if one not in self.files:
            self.missing.append(s.name)
            return
        shape = self.files.headers[one].shape
        if shape != expected:
            self._fault(f"tensor {one} has shape {list(shape)}, expected {list(expected)}")
            return
        try:
            if stacked:
                self.stored[s.name] = plain(self.files, one, stacked.index, stacked.transposed)
            elif len(s.shape) == 2:
                self.stored[s.name] = stored(self.files, one, announced)
            else:
                self.stored[s.name] = plain(self.files, one)
        except CmxError as error:
            self._fault(str(error))

    def _fault(self, line: str) -> None:
        if line not in self.faults[-1:]:  # stacked experts would repeat it
            self.faults.append(line)

    def _unused(self) -> set[str]:
        """Names of tensors in the files that no source uses."""
        used = {s.name for s in self.sources}
        for tensor in self.stored.values():
            used |= {tensor.name, *tensor.companions}
        stacks = {s.stacked.name for s in self.sources if s.stacked} if self.faults else set()
        return self.files.headers.keys() - used - stacks

    def _without_extra_layers(self, names: set[str]) -> set[str]:
        """Returns the names of layers that the config asks for, and takes note of the other layers."""
        c = self.config
        used = c.num_hidden_layers + (c.num_nextn_predict_layers if self.mtp else 0)
        extra = {name: layer for name in names if (layer := _layer_of(name)) is not None and layer >= used}
        if not extra:
            return names
        mtp = {layer for name, layer in extra.items() if name.endswith(_MTP_ONLY)}
        others = sorted(set(extra.values()) - mtp)
        if others:
            stored = _span(sorted(set(extra.values())))
            self.faults.append(
                f"{stored} stored and not used, as num_hidden_layers is {c.num_hidden_layers}: expected "
                "weights of as many layers"
            )
        else:
            named = f"num_nextn_predict_layers is {c.num_nextn_predict_layers}"
            self.notes.append(f"MTP {_span(sorted(mtp))} stored and not used, as {named}")
        return names - extra.keys()

    def _ignored(self, name: str) -> bool:
        """Returns whether a tensor may be ignored: frequencies, copies of embedding or head, empty ones."""
        c, shape = self.config, self.files.headers[name].shape
        if name.endswith("rotary_emb.inv_freq") or name.startswith(_OTHER_MODELS):
            return True
        if name.endswith("._extra_state"):  # Transformer Engine's; it may hold scales
            return 0 in shape
        for i in range(c.num_nextn_predict_layers if self.mtp else 0):
            layer = f"model.layers.{c.num_hidden_layers + i}."
            if name in (layer + copy for copy in _COPIES):  # by definition (DeepSeek-V3 report, section 2.2)
                return shape == (c.vocab_size, c.hidden_size)
        if c.tie_word_embeddings and name == "lm_head.weight":
            return self._same_tensor(name, "model.embed_tokens.weight")
        empty = ".mlp.shared_experts." in name and 0 in shape
        return empty or self._is_zero_bias(name)

    def _same_tensor(self, name: str, other: str) -> bool:
        """Returns whether two matrices have equal shapes, types, and rows at both ends and in the middle."""
        headers = self.files.headers
        if other not in headers or headers[name].dtype not in FLOATS:
            return False
        if (headers[name].shape, headers[name].dtype) != (headers[other].shape, headers[other].dtype):
            return False
        count = headers[name].shape[0]
        starts = {0, count // 2, max(count - _SAMPLE, 0)}
        parts = [(slice(start, start + _SAMPLE),) for start in sorted(starts)]
        return all(
            np.array_equal(self.files.read(name, rows), self.files.read(other, rows)) for rows in parts
        )

    def _is_zero_bias(self, name: str) -> bool:
        """Returns whether a tensor is a norm's bias of zeros.

        Ascend's outlier suppression leaves norms with a bias, which is zero if it moved nothing.
        """
        header = self.files.headers[name]
        if not name.endswith("norm.bias") or header.dtype not in FLOATS:
            return False
        return not self.files.read(name).astype(np.float32).any()


def _has_mtp(c: ModelConfig, files: TensorFiles) -> bool:
    """Returns whether an MTP layer of the config is stored: tensors that only MTP layers have."""
    layers = range(c.num_hidden_layers, c.num_hidden_layers + c.num_nextn_predict_layers)
    return any(name.endswith(_MTP_ONLY) and _layer_of(name) in layers for name in files.headers)


def _layer_of(name: str) -> int | None:
    """Returns the number of the layer that a tensor belongs to."""
    match = re.match(r"model\.layers\.(\d+)\.", name)
    return int(match[1]) if match else None


def _span(layers: list[int]) -> str:
    return f"layer {layers[0]} is" if len(layers) == 1 else f"layers {layers[0]} to {layers[-1]} are"
