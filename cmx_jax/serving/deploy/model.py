"""A model on disk: located by name or path, read once, and put on any number of instances."""

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
from cmx_jax.model.checkpoint.load import HostParts
from cmx_jax.model.checkpoint.source import Checkpoint, digest
from cmx_jax.model.config import ModelConfig
from cmx_jax.model.decode import MAX_DRAFTS
from cmx_jax.model.families import preset, presets, read_config
from cmx_jax.model.weights import int8_fields
from cmx_jax.serving.executor.instance import Instance
from cmx_jax.serving.executor.programs import Programs
from cmx_jax.serving.scheduling.allocator import Capacity

SHIPPED = ("tiny",)
DTYPES = ("float32", "bfloat16")


def locate(name_or_path: str | Path) -> Path:
    """Returns the directory of a model that ships with the package, or of a path.

    Raises:
      CmxError: The name is neither a shipped model nor a directory.
    """
    if str(name_or_path) in SHIPPED:
        return Path(str(files("cmx_jax") / "model" / "checkpoints" / str(name_or_path)))
    try:
        path = Path(name_or_path).expanduser()
        exists = path.is_dir()
    except (RuntimeError, OSError, ValueError):  # an unknown ~user, an impossible name
        exists = False
    if not exists and str(name_or_path) in presets():
        raise CmxError(
            f"{name_or_path} is a preset, a config without weights: give the directory that has them"
        )
    if not exists:
        raise CmxError(
            f"model {str(name_or_path)!r} is neither a directory nor a model that ships: {', '.join(SHIPPED)}"
        )
    return path


def located(name_or_path: str) -> str | Path:
    """Returns the name of a preset unchanged, else the directory that `locate` returns."""
    return (
        name_or_path
        if name_or_path in presets() and not Path(name_or_path).exists()
        else locate(name_or_path)
    )


def config_of(name_or_path: str) -> ModelConfig:
    """Returns the config of a preset, of a shipped model, or of a directory, without reading weights.

    Raises:
      CmxError: The name is unknown, or the config is refused.
    """
    location = located(name_or_path)
    return preset(location) if isinstance(location, str) else read_config(location)


@dataclass(frozen=True)
class Model:
    """Config, checkpoint and tokenizer of a directory. Weights are read when an instance is made.

    Attributes:
      directory: Directory of the model.
      config: Config, with the matrices to compute in INT8.
      checkpoint: Checkpoint with the weights.
      tokenizer: Tokenizer, or None if the directory has none.
      dtype: Type of weights that are floats, of the cache and of arithmetic.
    """

    directory: Path
    config: ModelConfig
    checkpoint: Checkpoint
    tokenizer: Tokenizer | None
    dtype: str

    @classmethod
    def read(cls, name_or_path: str | Path, dtype: str = "float32", quant: str = "auto") -> "Model":
        """Locates a model and checks its files.

        Args:
          name_or_path: The model.
          dtype: Type of weights that are floats, of the cache and of arithmetic.
          quant: Option `quant` of `EngineArgs`.

        Raises:
          CmxError: The model is unknown, or refused; the message names the field or tensor.
        """
        if dtype not in DTYPES:
            raise CmxError(f"dtype {dtype!r} is unknown, expected one of {list(DTYPES)}")
        directory = locate(name_or_path)
        checkpoint = open_checkpoint(directory)
        config = _quantized(checkpoint, quant)
        return cls(directory, config, checkpoint, _tokenizer(directory, config), dtype)

    @cached_property
    def id(self) -> str:
        """Id of weights and arithmetic: equal ids give equal cached rows, except for their type."""
        arithmetic = json.dumps([sorted(self.config.int8), self.config.int8_scales], default=str)
        return hashlib.sha256(f"{digest(self.directory)} {arithmetic}".encode()).hexdigest()

    @property
    def mtp_missing(self) -> bool:
        """True if the config has MTP layers, but the checkpoint stores none."""
        return self.config.num_nextn_predict_layers > 0 and not self.checkpoint.mtp

    def encode(self, prompt: object, special: bool = True) -> list[int]:
        """Returns the token ids of a prompt; ids pass through.

        Args:
          prompt: Text or token ids.
          special: True to add the tokens that the tokenizer puts around a sequence.

        Raises:
          CmxError: The prompt is text and the model has no tokenizer, or it is neither text nor ids.
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
        """Returns the text of token ids without special tokens, or '' without a tokenizer."""
        return "" if self.tokenizer is None else self.tokenizer.decode(tokens)

    def instance(
        self,
        name: str,
        layout: Layout,
        runner: Runner,
        capacity: Capacity,
        num_speculative_tokens: int = 0,
        kv_cache_dtype: str = "auto",
        shared: HostParts | None = None,
    ) -> Instance:
        """Starts an instance of the model; each rank's weights are read from the files.

        Args:
          name: Name of the instance.
          layout: Layout of the ranks.
          runner: Runner of the programs.
          capacity: Capacity of each rank.
          num_speculative_tokens: Number of MTP drafts of a decode step.
          kv_cache_dtype: Type of the cached rows.
          shared: Weights that instances with the same layout have read; see `load_weights`.

        Raises:
          CmxError: A weight is not finite, the experts do not fit the slots, the model has no MTP layer to
            draft with, or the cache type is unknown.
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
        weights = load_weights(self.checkpoint, layout, runner, dtype, drafts > 0, self.config, shared)
        programs = Programs(name, self.config, layout, runner, weights, capacity, self.dtype, drafts, kept)
        return Instance(programs)


QUANTS = ("auto", "none", "int8")


def _quantized(checkpoint: Checkpoint, quant: str) -> ModelConfig:
    """Returns the config, with the matrices to compute in INT8."""
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
