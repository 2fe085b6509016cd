"""The training script computes what is served, balances experts, and goes on where it stopped."""

import argparse
import importlib.util
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import BASE
from tokenizers import Tokenizer

from cmx_jax.analysis.eval.skills import SKILLS
from cmx_jax.model.checkpoint import read_weights, write_weights
from cmx_jax.model.config import ModelConfig
from cmx_jax.model.families import parse_config
from cmx_jax.model.weights import Weights
from cmx_jax.serving.deploy.llm import from_pretrained
from cmx_jax.serving.deploy.model import locate

pytestmark = pytest.mark.slow

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


def test_training_logits_equal_served_logits(script, config, raw, weights, tmp_path) -> None:
    """Written as a Hugging Face directory and served over 4 ranks; capacity large enough to drop nothing."""
    (tmp_path / "config.json").write_text(json.dumps(raw))
    write_weights(tmp_path, config, weights, np.float32)
    tokens = np.random.default_rng(0).integers(0, config.vocab_size, (2, 24)).astype(np.int32)
    main, _, load = jax.jit(lambda t: script.forward(weights, config, t, capacity=16.0))(tokens)
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

    @jax.jit
    def loss(step: float) -> jax.Array:
        ffn = weights.moe.ffn
        experts = ffn.experts.replace(down=ffn.experts.down + step * direction)
        moved = weights.replace(moe=weights.moe.replace(ffn=ffn.replace(experts=experts)))
        main, draft, _ = script.forward(moved, config, tokens, 16.0)
        return script.losses(main, draft, tokens)[0].mean()

    slope = jax.jit(jax.grad(loss))(np.float32(0))
    width = np.float32(1e-3)
    assert slope == pytest.approx(float(loss(width) - loss(-width)) / (2 * width), rel=1e-2)
    assert abs(slope) > 1e-3


def test_balancing_lowers_the_bias_of_busy_experts_only(script, config, weights) -> None:
    load = np.full((config.num_moe_layers + 1, config.n_routed_experts), 10, np.int32)
    load[:, 0], load[:, 1] = 16, 4
    moved = script.balance(weights, load, np.float32(0.5))
    for bias in (moved.moe.ffn.router_bias, moved.mtp.layer.ffn.router_bias):
        assert np.asarray(bias)[..., :3].tolist() == [[-0.5, 0.5, 0.0]] * len(bias)


def test_questions_in_a_row_do_not_see_each_other(script, config, weights) -> None:
    """Packed behind each other, with padding, they get the states that they get alone."""
    skills, rng = sys.modules["tiny_skills"], np.random.default_rng(8)
    lengths = (9, 4, 12, 7, 3, 16)
    asked = [skills.Question(rng.integers(0, config.vocab_size, n).tolist(), 2) for n in lengths]
    packed = skills.pack(skills.lay_out(asked, 16), 16)
    assert packed.tokens.shape == (4, 16)
    assert packed.asked.sum() == 2 * len(asked)
    states = jax.jit(lambda packed: script.packed_states(weights, config, packed, 16.0))
    hidden, load = states(packed)
    assert np.asarray(load)[0].sum() == sum(lengths) * config.num_experts_per_tok
    alone, _ = states(skills.pack([[question] for question in asked], 16))
    ends = np.argwhere(packed.asked)[1::2]  # in the order of the questions
    for i, (n, (row, end)) in enumerate(zip(lengths, ends, strict=True)):
        np.testing.assert_allclose(hidden[row, end + 1 - n : end + 1], alone[i, :n], atol=1e-5)


def shipped_tokenizer() -> Tokenizer:
    return Tokenizer.from_file(str(locate("tiny") / "tokenizer.json"))


def test_evaluation_questions_are_not_trained_on(script) -> None:
    skills, tokenizer = sys.modules["tiny_skills"], shipped_tokenizer()
    mixture = skills.Mixture(np.arange(900, dtype=np.int32), tokenizer, 0, batch=6, length=128, prose=2)
    evaluated = {item.prompt for skill in SKILLS for item in skill.items()}
    assert mixture.refused | {item.prompt for item in SKILLS[-1].items()} == evaluated
    trained = [prompt for prompt, _ in mixture.drawn(np.random.default_rng(5), 3000, cycle=1)]
    assert evaluated.isdisjoint(trained)
    assert len({prompt.split()[0] for prompt in trained}) == 16  # compare has two names; prose is not asked

    first, again, other = mixture.batch(3, 0), mixture.batch(3, 0), mixture.batch(3, 1)
    chex.assert_trees_all_equal(first, again)
    assert not np.array_equal(first.tokens, other.tokens)
    assert first.tokens.shape == (6, 128)
    assert first.asked[:2].all()
    assert 0.1 < first.asked[2:].mean() < 0.5
    assert tokenizer.decode(first.tokens[2].tolist()).count(" ->") == (first.positions[2] == 0).sum()


def test_accuracy_counts_exact_answers_and_likeliest_choices(script) -> None:
    """A model that is sure of what it is told: of every answer but to three questions."""
    skills, tokenizer = sys.modules["tiny_skills"], shipped_tokenizer()
    for name in ("copy", "member"):
        items = next(s for s in SKILLS if s.name == name).items(count=40)
        wrong = {tuple(tokenizer.encode(i.prompt).ids) for i in items[:3]}

        def run(packed, items=items, wrong=wrong):
            right = {
                (*tokenizer.encode(i.prompt).ids, *tokenizer.encode(i.choices[i.answer]).ids) for i in items
            }
            good = np.zeros(packed.tokens.shape, bool)
            for row in range(len(good)):
                for begin in np.flatnonzero(packed.positions[row] == 0):
                    inside = (packed.begin[row] == begin) & (packed.positions[row] >= 0)
                    sequence = tuple(packed.tokens[row, inside].tolist())
                    assert sequence[0] == 0
                    spoilt = any(sequence[1 : 1 + len(w)] == w for w in wrong)
                    good[row, inside] = (sequence[1:] in right) is not spoilt
            return np.where(good, 0.1, 2.0)[:, 1:], good[:, 1:]

        assert skills.accuracy(run, items, tokenizer, batch=4, length=64) == 92.5


def test_skills_stage_keeps_mtp_layer(script, config, weights, tmp_path) -> None:
    skills, given = sys.modules["tiny_skills"], jax.tree.map(np.array, weights)
    asked = skills.pack([[skills.Question(list(range(n)), 2) for n in (7, 9)]] * 2, 16)
    said = np.full((1, 16, config.vocab_size), -np.log(config.vocab_size), np.float32)
    course = script.Course(
        folder="skills", steps=4, rate=1e-3, mask=script.of_mtp(config, outside=True),
        objective=lambda w, batch: script.mixture_loss(w, config, batch, 4.0),
        batch=lambda step: (asked._replace(tokens=asked.tokens + np.int32(step)), said),
        speed=lambda step: np.float32(0.001), check=lambda w: "",
    )  # fmt: skip
    found = script.follow(arguments(tmp_path, None), config, jax.tree.map(jnp.asarray, given), course)
    chex.assert_trees_all_equal(found.mtp, given.mtp)
    assert not np.array_equal(found.head, given.head)
    assert not np.array_equal(found.moe.ffn.router_bias, given.moe.ffn.router_bias)


def arguments(work: Path, until: int | None) -> argparse.Namespace:
    return argparse.Namespace(
        work=work, steps=4, until=until, batch=2, length=16, rate=1e-3, decay=0.1, capacity=4.0, seed=0,
        save_every=1, log_every=1, eval_every=0,
    )  # fmt: skip


def test_resumed_training_equals_uninterrupted(script, config, tmp_path) -> None:
    stream = np.random.default_rng(4).integers(0, config.vocab_size, 500).astype(np.int32)
    whole = script.train(arguments(tmp_path / "whole", None), config, (stream, stream))
    with pytest.raises(SystemExit, match="stopped behind step 1"):
        script.train(arguments(tmp_path / "parts", 2), config, (stream, stream))
    parts = script.train(arguments(tmp_path / "parts", None), config, (stream, stream))
    chex.assert_trees_all_equal(whole, parts)
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
    chex.assert_trees_all_equal(found.replace(mtp=None), given.replace(mtp=None))
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


def test_shipped_checkpoint_reads_back_as_written(config, weights, tmp_path) -> None:
    write_weights(tmp_path, config, weights, np.float32)
    chex.assert_trees_all_equal(weights, read_weights(tmp_path, config, np.float32))
