"""The training script computes what is served, balances experts, and goes on where it stopped."""

import argparse
import importlib.util
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import BASE

from cmx_jax.model.checkpoint import read_weights, write_weights
from cmx_jax.model.config import ModelConfig
from cmx_jax.model.families import parse_config
from cmx_jax.model.weights import Weights
from cmx_jax.serving.llm import from_pretrained

SCRIPTS = Path(__file__).parents[2] / "scripts"


@pytest.fixture(scope="module")
def script() -> ModuleType:
    sys.path.insert(0, str(SCRIPTS))
    spec = importlib.util.spec_from_file_location("train_tiny", SCRIPTS / "train_tiny.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(autouse=True)
def optax_promotes() -> Iterator[None]:
    with jax.numpy_dtype_promotion("standard"):  # optax mixes int32 counts with floats
        yield


@pytest.fixture(scope="module")
def raw() -> dict:
    return json.loads((BASE / "config.json").read_text())


@pytest.fixture(scope="module")
def config(raw: dict) -> ModelConfig:
    return parse_config(raw)


@pytest.fixture(scope="module")
def weights(script: ModuleType, config: ModelConfig) -> Weights:
    return jax.tree.map(jnp.asarray, script.init(config, seed=3))


def test_the_training_graph_computes_the_served_logits(script, config, raw, weights, tmp_path) -> None:
    """Written as a Hugging Face directory and served over 4 ranks; capacity large enough to drop nothing."""
    (tmp_path / "config.json").write_text(json.dumps(raw))
    write_weights(tmp_path, config, weights, np.float32)
    tokens = np.random.default_rng(0).integers(0, config.vocab_size, (2, 24)).astype(np.int32)
    main, _, load = script.forward(weights, config, jnp.asarray(tokens), capacity=16.0)
    served = from_pretrained(tmp_path, ranks=4)
    np.testing.assert_allclose(np.asarray(main), served.logits(tokens), atol=1e-5)
    moe_layers = config.num_moe_layers + config.num_nextn_predict_layers
    assert np.asarray(load).sum(-1).tolist() == [tokens.size * config.num_experts_per_tok] * moe_layers


def test_gradients_are_those_of_finite_differences(script, config, weights) -> None:
    """Through the hand-written backward pass of the permutations, in the last layer: no routing behind it."""
    tokens = jnp.asarray(np.random.default_rng(1).integers(0, config.vocab_size, (1, 12)), jnp.int32)
    direction = np.random.default_rng(2).standard_normal(weights.moe.ffn.experts.down.shape)
    direction[:, :-1] = 0
    direction = direction.astype(np.float32)

    def loss(step: float) -> jax.Array:
        ffn = weights.moe.ffn
        experts = ffn.experts.replace(down=ffn.experts.down + step * direction)
        moved = weights.replace(moe=weights.moe.replace(ffn=ffn.replace(experts=experts)))
        main, draft, _ = script.forward(moved, config, tokens, 16.0)
        return script.losses(main, draft, tokens)[0].mean()

    slope = jax.grad(loss)(np.float32(0))
    width = np.float32(1e-3)
    assert slope == pytest.approx(float(loss(width) - loss(-width)) / (2 * width), rel=1e-2)
    assert abs(slope) > 1e-3


def test_balancing_lowers_the_bias_of_busy_experts_only(script, config, weights) -> None:
    load = np.full((config.num_moe_layers + 1, config.n_routed_experts), 10, np.int32)
    load[:, 0], load[:, 1] = 16, 4
    moved = script.balance(weights, load, np.float32(0.5))
    for bias in (moved.moe.ffn.router_bias, moved.mtp.layer.ffn.router_bias):
        assert np.asarray(bias)[..., :3].tolist() == [[-0.5, 0.5, 0.0]] * len(bias)


def arguments(work: Path, until: int | None) -> argparse.Namespace:
    return argparse.Namespace(
        work=work, steps=4, until=until, batch=2, length=16, rate=1e-3, decay=0.1, capacity=4.0, seed=0,
        save_every=1, log_every=1, eval_every=0,
    )  # fmt: skip


def test_a_resumed_training_equals_one_that_never_stopped(script, config, tmp_path) -> None:
    stream = np.random.default_rng(4).integers(0, config.vocab_size, 500).astype(np.int32)
    whole = script.train(arguments(tmp_path / "whole", None), config, (stream, stream))
    with pytest.raises(SystemExit, match="stopped behind step 1"):
        script.train(arguments(tmp_path / "parts", 2), config, (stream, stream))
    parts = script.train(arguments(tmp_path / "parts", None), config, (stream, stream))
    jax.tree.map(np.testing.assert_array_equal, whole, parts)
    assert not np.array_equal(whole.head, script.init(config, 0).head)


def test_distilling_trains_the_mtp_layer_alone(script, config, weights) -> None:
    """Towards the model's own predictions, with its hidden states computed beforehand."""
    rows = np.random.default_rng(6).integers(0, config.vocab_size, (8, 16)).astype(np.int32)
    args = argparse.Namespace(
        mtp_steps=12, mtp_rate=1e-2, batch=8, seed=0, decay=0.1, capacity=16.0, log_every=12
    )
    batch = rows, script.states_of(weights, config, rows, 8)
    loss = jax.jit(lambda w: script.distillation_loss(w, config, jax.tree.map(jnp.asarray, batch), 16.0)[0])
    given = jax.tree.map(np.array, weights)
    found = script.distil(args, config, jax.tree.map(jnp.asarray, given), rows)
    jax.tree.map(np.testing.assert_array_equal, found.replace(mtp=None), given.replace(mtp=None))
    assert loss(found) < 0.8 * loss(weights)


def test_documents_are_split_by_their_text_and_round_trip(script) -> None:
    corpus = sys.modules["tiny_corpus"]
    texts = [f"module.function{i}\n\nReturn the number {i}, or naïve ünïcode." for i in range(400)]
    train, held_out = corpus.split(texts)
    assert sorted(train + held_out) == sorted(texts)
    assert 0 < len(held_out) < 40
    tokenizer = corpus.train_tokenizer(train, 320)
    for text in held_out:
        assert tokenizer.decode(tokenizer.encode(text).ids) == text


def test_the_shipped_checkpoint_reads_back_as_written(config, weights, tmp_path) -> None:
    write_weights(tmp_path, config, weights, np.float32)
    jax.tree.map(np.testing.assert_array_equal, weights, read_weights(tmp_path, config, np.float32))
