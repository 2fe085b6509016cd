"""A Hugging Face directory: `config.json`, `*.safetensors`, in any of the stored forms of `schemes.py`."""

from collections import defaultdict
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from cmx_jax.errors import CmxError
from cmx_jax.model.checkpoint.declared import DESCRIPTION, Declared, declared
from cmx_jax.model.checkpoint.files import FLOATS, Header, TensorFiles, fill_finite, finite
from cmx_jax.model.checkpoint.names import Piece, Source, sources
from cmx_jax.model.checkpoint.schemes import Stored, plain, stored
from cmx_jax.model.config import ModelConfig
from cmx_jax.model.families import read_config
from cmx_jax.model.fields import read_json

_COPIES = ("embed_tokens.weight", "shared_head.head.weight")  # what an MTP layer holds of the main model
_SAMPLE = 256  # rows that are compared

# Of a multimodal directory the text model is read; transformers has used both orders of the prefix.
_PREFIXES = {"language_model.model.": "model.", "model.language_model.": "model.", "language_model.": ""}


def text_name(name: str) -> str:
    """A tensor's name without the prefix that the text model has in a multimodal directory."""
    prefix = next((p for p in _PREFIXES if name.startswith(p)), "")
    return _PREFIXES.get(prefix, "") + name.removeprefix(prefix)


_OTHER_MODELS = (
    "vision_model.",
    "multi_modal_projector.",
    "model.vision_model.",
    "model.multi_modal_projector.",
)


class HuggingFace:
    """What is in the files, held against what the config asks for.

    Attributes:
      config: the model.
      mtp: whether MTP layers are stored.
      stored: how each tensor of the config is stored, by name.
      missing, unknown: names on one side only.
      faults: what else is wrong, a line each.
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
        self.faults = [
            f"tensor {name} is described in {DESCRIPTION}, but not there"
            for name in announced.ascend
            if name not in self.files and text_name(name) not in self.files
        ]
        for s in self.sources:
            if s.name not in self.stored:
                self._find(s, announced)
        self.missing = sorted(set(self.missing))
        self.unknown = sorted(name for name in self._unused() if not self._ignored(name))

    @cached_property
    def sources(self) -> list[Source]:
        """Every tensor that the config asks for."""
        return list(sources(self.config, self.mtp))

    @cached_property
    def wide(self) -> frozenset[tuple[str, str]]:
        """Fields of which something is stored in more digits than bfloat16 has."""
        return frozenset(
            s.piece[:2]
            for s in self.sources
            if s.name in self.stored and self.stored[s.name].scheme in ("F32", "F16")
        )

    @cached_property
    def int8(self) -> tuple[frozenset[tuple[str, str]], str]:
        """See `cmx_jax.model.checkpoint.source.Checkpoint`."""
        found = [(s.piece[:2], self.stored[s.name]) for s in self.sources if s.name in self.stored]
        rounded = {field for field, how in found if how.channels}
        floats = {field for field, how in found if not how.channels}
        scales = {self.files.headers[how.companions[0]].dtype for _, how in found if how.channels}
        return frozenset(rounded - floats), "bfloat16" if scales <= {"BF16"} else "float32"

    @cached_property
    def _pieces(self) -> dict[Piece, list[Source]]:
        found: dict[Piece, list[Source]] = defaultdict(list)
        for s in self.sources:
            found[s.piece].append(s)
        return found

    def check(self) -> "HuggingFace":
        """Refuses the directory unless it holds just what the config asks for; names the first tensor."""
        for fault in self.faults:
            raise CmxError(fault)
        for what, names in (("is missing", self.missing), ("is not part of this architecture", self.unknown)):
            if names:
                more = f" (and {len(names) - 1} more)" if len(names) > 1 else ""
                raise CmxError(f"{self.directory}: tensor {names[0]} {what}{more}")
        return self

    def fill(self, piece: Piece, out: np.ndarray) -> None:
        """Writes a piece into `out`, which has its shape and the wanted type.

        Raises:
          CmxError: a number or scale is not finite.
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
        """A tensor of the file format, experts one by one, decoded.

        Raises:
          CmxError: a number or scale is not finite.
        """
        found = self.stored[name]
        return finite(found.decode(), dtype, f"tensor {found.name}")

    def _strip_prefixes(self) -> None:
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
        """Looks a source up and notes how it is stored, or what is wrong with it."""
        stacked = None if s.name in self.files else s.stacked
        one, expected = (stacked.name, stacked.shape) if stacked else (s.name, s.shape)
        if one not in self.files:
            self.missing.append(s.name)
            return
        given = self.files.headers[one].shape
        if given != expected:
            self._fault(f"tensor {one} has shape {list(given)}, expected {list(expected)}")
            return
        try:
            if stacked:
                self.stored[s.name] = plain(self.files, one, stacked.at, stacked.transposed)
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
        used = {s.name for s in self.sources}
        for found in self.stored.values():
            used |= {found.name, *found.companions}
        wanted = {s.stacked.name for s in self.sources if s.stacked} if self.faults else set()
        return self.files.headers.keys() - used - wanted

    def _ignored(self, name: str) -> bool:
        """Tensors that carry nothing of their own: frequencies, copies of embedding and head, empty ones."""
        c, shape = self.config, self.files.headers[name].shape
        if name.endswith("rotary_emb.inv_freq") or name.startswith(_OTHER_MODELS):
            return True
        for i in range(c.num_nextn_predict_layers if self.mtp else 0):
            layer = f"model.layers.{c.num_hidden_layers + i}."
            if name in (layer + copy for copy in _COPIES):  # by definition (DeepSeek-V3 report, section 2.2)
                return shape == (c.vocab_size, c.hidden_size)
        if c.tie_word_embeddings and name == "lm_head.weight":
            return self._same_tensor(name, "model.embed_tokens.weight")
        empty = ".mlp.shared_experts." in name and 0 in shape
        return empty or self._is_zero_bias(name)

    def _same_tensor(self, name: str, other: str) -> bool:
        """Whether two matrices are alike: in shape, type, and the rows at both ends and in the middle."""
        headers = self.files.headers
        if other not in headers or headers[name].dtype not in FLOATS:
            return False
        if (headers[name].shape, headers[name].dtype) != (headers[other].shape, headers[other].dtype):
            return False
        rows = headers[name].shape[0]
        starts = {0, rows // 2, max(rows - _SAMPLE, 0)}
        parts = [(slice(start, start + _SAMPLE),) for start in sorted(starts)]
        return all(np.array_equal(self.files.read(name, at), self.files.read(other, at)) for at in parts)

    def _is_zero_bias(self, name: str) -> bool:
        """Ascend's outlier suppression leaves norms with a bias, of zeros where it moved nothing."""
        header = self.files.headers[name]
        if not name.endswith("norm.bias") or header.dtype not in FLOATS:
            return False
        return not self.files.read(name).astype(np.float32).any()


def _has_mtp(c: ModelConfig, files: TensorFiles) -> bool:
    """Whether any tensor of an MTP layer is stored."""
    prefixes = tuple(f"model.layers.{c.num_hidden_layers + i}." for i in range(c.num_nextn_predict_layers))
    return bool(prefixes) and any(name.startswith(prefixes) for name in files.headers)
