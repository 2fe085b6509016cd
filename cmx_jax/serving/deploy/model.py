"""A model on disk: found by name or path, read once, put on as many instances as wanted."""

import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import cached_property
from importlib.resources import files
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from tokenizers import Tokenizer

from cmx_jax.errors import CmxError
from cmx_jax.mesh.layout import Layout
from cmx_jax.mesh.runners import Runner
from cmx_jax.model.cache import cache_dtype
from cmx_jax.model.checkpoint import load_weights, open_checkpoint
from cmx_jax.model.checkpoint.source import Checkpoint, digest
from cmx_jax.model.config import ModelConfig
from cmx_jax.model.decode import MAX_DRAFTS
from cmx_jax.model.families import preset, presets, read_config
from cmx_jax.model.weights import int8_fields
from cmx_jax.serving.executor.instance import Instance
from cmx_jax.serving.scheduling.ranks import Capacity

SHIPPED = ("tiny",)
DTYPES = ("float32", "bfloat16")


def locate(name_or_path: str | Path) -> Path:
    """The directory of a model: one that ships with the package, or a path.

    Raises:
      CmxError: it is neither.
    """
    if str(name_or_path) in SHIPPED:
        return Path(str(files("cmx_jax") / "model" / "checkpoints" / str(name_or_path)))
    try:
        path = Path(name_or_path).expanduser()
        found = path.is_dir()
    except (RuntimeError, OSError, ValueError):  # an unknown ~user, an impossible name
        found = False
    if not found and str(name_or_path) in presets():
        raise CmxError(
            f"{name_or_path} is a preset, a config without weights: give the directory that has them"
        )
    if not found:
        raise CmxError(
            f"model {str(name_or_path)!r} is neither a directory nor a model that ships: {', '.join(SHIPPED)}"
        )
    return path


def located(name_or_path: str) -> str | Path:
    """As `locate`, but the name of a preset is itself."""
    return (
        name_or_path
        if name_or_path in presets() and not Path(name_or_path).exists()
        else locate(name_or_path)
    )


def config_of(name_or_path: str) -> ModelConfig:
    """The config of a preset, of a model that ships, or of a directory; no weights are looked at.

    Raises:
      CmxError: there is none.
    """
    found = located(name_or_path)
    return preset(found) if isinstance(found, str) else read_config(found)


@dataclass(frozen=True)
class Model:
    """Config, checkpoint and tokenizer of a directory. Weights are read when an instance is made."""

    directory: Path
    config: ModelConfig
    checkpoint: Checkpoint
    tokenizer: Tokenizer | None
    dtype: str

    @classmethod
    def read(cls, name_or_path: str | Path, dtype: str = "float32", quant: str = "auto") -> "Model":
        """Finds a model and checks its files.

        Args:
          name_or_path: the model.
          dtype: of what is floats.
          quant: see `cmx_jax.serving.deploy.llm.from_pretrained`.

        Raises:
          CmxError: there is none of that name, or it is refused; the field or tensor is named.
        """
        if dtype not in DTYPES:
            raise CmxError(f"dtype {dtype!r} is unknown, expected one of {list(DTYPES)}")
        directory = locate(name_or_path)
        checkpoint = open_checkpoint(directory)
        config = _quantized(checkpoint, quant)
        return cls(directory, config, checkpoint, _tokenizer(directory, config), dtype)

    @cached_property
    def id(self) -> str:
        """Of weights and arithmetic: equal ids make equal rows in caches, but for their type."""
        how = json.dumps([sorted(self.config.int8), self.config.int8_scales], default=str)
        return hashlib.sha256(f"{digest(self.directory)} {how}".encode()).hexdigest()

    @property
    def mtp_missing(self) -> bool:
        """The config names MTP layers, but none is stored."""
        return self.config.num_nextn_predict_layers > 0 and not self.checkpoint.mtp

    def encode(self, prompt: object, special: bool = True) -> list[int]:
        """Token ids of a prompt; ids pass through.

        Args:
          prompt: text or ids.
          special: whether text gets the tokens that the tokenizer puts around a sequence, if any.

        Raises:
          CmxError: text, and the model has no tokenizer; or neither text nor ids.
        """
        if isinstance(prompt, str):
            if self.tokenizer is None:
                raise CmxError(f"{self.directory} has no tokenizer.json: give token ids instead of text")
            try:
                prompt.encode()
            except UnicodeEncodeError as error:
                raise CmxError(f"the prompt is not Unicode text ({error.reason}), expected UTF-8") from None
            return list(self.tokenizer.encode(prompt, add_special_tokens=special).ids)
        ids = list(prompt) if isinstance(prompt, Iterable) else None
        if ids is None or not all(isinstance(token, int | np.integer) for token in ids):
            raise CmxError(f"a prompt is {prompt!r}, expected text or a list of token ids")
        return [int(token) for token in ids]

    def decode(self, tokens: list[int]) -> str:
        """Text of token ids, without special tokens (empty without a tokenizer)."""
        return "" if self.tokenizer is None else self.tokenizer.decode(tokens)

    def instance(
        self,
        name: str,
        layout: Layout,
        runner: Runner,
        capacity: Capacity,
        num_speculative_tokens: int = 0,
        kv_cache_dtype: str = "auto",
    ) -> Instance:
        """This model on an instance; each rank's weights are read from the files.

        Raises:
          CmxError: a number in them is not finite, or the experts do not fit the slots, or there is no MTP
            layer to draft with, or no such type of cache.
        """
        kept = cache_dtype(kv_cache_dtype, self.dtype)
        drafts = num_speculative_tokens
        if not 0 <= drafts <= MAX_DRAFTS or (drafts and not self.checkpoint.mtp):
            stored = self.checkpoint.mtp or drafts < 0
            expected = (
                f"zero or more, at most {MAX_DRAFTS}" if stored else "0: the model has no MTP layer stored"
            )
            raise CmxError(f"num_speculative_tokens is {drafts}, expected {expected}")
        dtype = jnp.dtype(self.dtype)
        weights = load_weights(self.checkpoint, layout, runner, dtype, drafts > 0, self.config)
        return Instance(name, self.config, layout, runner, weights, capacity, self.dtype, drafts, kept)


QUANTS = ("auto", "none", "int8")


def _quantized(checkpoint: Checkpoint, quant: str) -> ModelConfig:
    """The config, with what is to be computed in INT8."""
    if quant not in QUANTS:
        raise CmxError(f"quant {quant!r} is unknown, expected one of {list(QUANTS)}")
    possible, (stored, scales) = int8_fields(checkpoint.config), checkpoint.int8
    fields = {"auto": possible & stored, "none": frozenset(), "int8": possible}[quant]
    return replace(checkpoint.config, int8=fields, int8_scales=scales)


def _tokenizer(directory: Path, config: ModelConfig) -> Tokenizer | None:
    path = directory / "tokenizer.json"
    if not path.is_file():
        return None
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises bare Exceptions
        raise CmxError(f"{path}: not a tokenizer ({error})") from None
    tokenizer.no_truncation()
    tokenizer.no_padding()
    if tokenizer.get_vocab_size() > config.vocab_size:
        raise CmxError(
            f"{path}: {tokenizer.get_vocab_size()} tokens, expected at most vocab_size {config.vocab_size}"
        )
    return tokenizer
