"""Folding of `cmx quantize` from one matrix into another does not change the output of a layer."""

import json
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from reference import pangu
from support import GOLDENS, MTP_GOLDENS

from cmx_jax.model.attention import data_parallel_attention
from cmx_jax.model.checkpoint import open_checkpoint
from cmx_jax.model.checkpoint.writer import PieceReader, write_weights
from cmx_jax.model.families import parse_config, presets
from cmx_jax.model.quantize import layer, observe
from cmx_jax.model.quantize.walk import Walk
from cmx_jax.model.weights import int8_fields
from cmx_jax.quant.scale_search import Scales
from model.quantized import FOLDED, TEXT
from model.small import random_weights

pytestmark = pytest.mark.slow


def any_scales(x: np.ndarray, weights: Any) -> Scales:
    """Scales that no search would find: the more they move, the more a fold can break."""
    s = np.exp2(np.random.default_rng(len(x)).uniform(-3, 3, x.shape[1])).astype(np.float32)
    return Scales(s, 0.0, 0.0)


def output(walk: Walk, number: int, parts: frozenset[str]) -> np.ndarray:
    """Hidden states after a layer that was transformed by these parts."""
    calibrated, expert = walk.calibrated(number, parts)
    routed = None if calibrated.seen.tokens is None else np.zeros_like(calibrated.seen.tokens)
    for e in range(walk.c.n_routed_experts if calibrated.kind.moe else 0):
        rows, answers = calibrated.expert(e, expert(e))[2]
        routed[rows] += answers
    x = walk._draft(calibrated.pieces)[0] if calibrated.stack == "mtp" else walk.x
    return calibrated.hidden(x, routed)


def write_palm(directory: Path) -> Path:
    """A small model of parallel blocks, of random numbers."""
    raw = json.loads(presets()["palm-540b"].read_text())
    sizes = {"hidden_size": 24, "intermediate_size": 20, "head_dim": 6, "num_attention_heads": 4}
    raw |= sizes | {"num_hidden_layers": 2, "vocab_size": 64, "max_position_embeddings": 64}
    write_weights(directory, parse_config(raw), random_weights(parse_config(raw)), "float32")
    (directory / "config.json").write_text(json.dumps(raw))
    return directory


WRITTEN = {"pangu": partial(pangu.write_tiny, seed=2), "palm": write_palm}
GIVEN = ("base", "attention_bias", "no_q_lora", "no_shared", "qwen3_bias", "llama4_interleave")


@pytest.mark.parametrize("case", [*GIVEN, "mtp", *WRITTEN])
def test_transformed_layer_has_the_same_output(case: str, tmp_path: Path, monkeypatch) -> None:
    """Every layer, in floats; MLA's once more in latent space, as it decodes."""
    path = MTP_GOLDENS / "base" if case == "mtp" else GOLDENS / case
    checkpoint = open_checkpoint(WRITTEN[case](tmp_path) if case in WRITTEN else path)
    walk = Walk(PieceReader(checkpoint), TEXT, FOLDED, int8_fields(checkpoint.config, checkpoint.mtp))
    monkeypatch.setattr(layer, "search_scales", any_scales)
    monkeypatch.setattr(layer, "MIN_ROWS", 4)  # for so little text
    layers = checkpoint.config.num_hidden_layers
    for number in range(layers + checkpoint.mtp):
        exact = output(walk, number, frozenset())
        close(output(walk, number, FOLDED), exact)
        if case == "no_q_lora":
            with monkeypatch.context() as latent:
                absorbed = partial(data_parallel_attention, absorbed=True)
                latent.setattr(observe, "data_parallel_attention", absorbed)
                observe._run.clear_cache()
                close(output(walk, number, FOLDED), exact)
            observe._run.clear_cache()
        walk.x = exact if number < layers else walk.x


def close(actual: np.ndarray, exact: np.ndarray) -> None:
    assert np.abs(actual - exact).max() <= 1e-4 * np.abs(exact).max()
