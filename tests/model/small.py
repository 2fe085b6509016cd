"""Helpers of the tests of the model wing: configs of the goldens, random weights, damaged files, refusals."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from support import BASE, GOLDENS

from cmx_jax.errors import CmxError
from cmx_jax.model.config import ModelConfig
from cmx_jax.model.families import parse_config
from cmx_jax.model.leaf import Leaf, leaf_dtype
from cmx_jax.model.weights import Weights, weight_tree

TENSORS = load_file(BASE / "model.safetensors")
GATE = "model.layers.2.mlp.gate.weight"
EXPERT = "model.layers.1.mlp.experts.7.up_proj.weight"


def raw_config(case: str = "base", **changes: Any) -> dict[str, Any]:
    """The `config.json` of a golden, with some fields changed."""
    return json.loads((GOLDENS / case / "config.json").read_text()) | changes


def without(field: str) -> dict[str, Any]:
    """The `config.json` of `base` without one field."""
    return {name: value for name, value in raw_config().items() if name != field}


def config(case: str = "base", **changes: Any) -> ModelConfig:
    return parse_config(raw_config(case, **changes))


def random_weights(c: ModelConfig, mtp: bool = True, dtype: type = np.float32, seed: int = 0) -> Weights:
    """Normally distributed values in every tensor, rounded to `dtype`; expert `e` in slot `e`."""
    rng = np.random.default_rng(seed)

    def make(leaf: Leaf) -> np.ndarray:
        if leaf.kind == "slots":
            return np.broadcast_to(np.arange(leaf.shape[-1], dtype=np.int32), leaf.shape)
        return rng.standard_normal(leaf.shape).astype(dtype).astype(leaf_dtype(leaf, dtype))

    return weight_tree(c, c.n_routed_experts, make, mtp)


def save(directory: Path, tensors: dict[str, np.ndarray]) -> Path:
    save_file(tensors, directory / "model.safetensors")
    return directory


def shard(directory: Path) -> Path:
    """`TENSORS` in two files and an index, every second tensor in each."""
    files = {name: f"model-{i % 2 + 1}-of-2.safetensors" for i, name in enumerate(sorted(TENSORS))}
    for file in set(files.values()):
        save_file({name: TENSORS[name] for name in TENSORS if files[name] == file}, directory / file)
    index = {"metadata": {"total_size": 0}, "weight_map": files}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    return directory


@contextmanager
def refused(*words: str) -> Iterator[None]:
    """Checks that the block raises a `CmxError` whose message is one line and contains all the words."""
    with pytest.raises(CmxError) as caught:
        yield
    message = str(caught.value)
    assert "\n" not in message
    for word in words:
        assert word in message
