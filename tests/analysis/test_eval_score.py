"""Likelihoods of continuations against NumPy on whole logits, and against greedy decoding."""

from pathlib import Path

import numpy as np
import pytest
from support import BASE

import cmx_jax
from cmx_jax.analysis.eval.score import answered, first_token, likelihoods
from cmx_jax.analysis.eval.skills import Item
from cmx_jax.errors import CmxError
from cmx_jax.serving.deploy.llm import LLM
from cmx_jax.serving.executor import scoring


@pytest.fixture(scope="module")
def contexts() -> list[list[int]]:
    rng = np.random.default_rng(1)
    return [rng.integers(1, 2048, length).tolist() for length in (1, 3, 9, 20, 40, 70)]


def expected(llm: LLM, prefix: list[int], target: list[int]) -> tuple[float, bool]:
    logits = llm.logits([[*prefix, *target]])[0, len(prefix) - 1 : -1].astype(np.float64)
    logprobs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    total = sum(logprobs[i, token] for i, token in enumerate(target))
    return total, logits.argmax(-1).tolist() == target


@pytest.mark.parametrize(("rows", "batches"), [(128, 2), (4, 4)])
@pytest.mark.slow
def test_likelihoods_equal_numpy_in_any_batches(tiny, contexts, rows, batches, monkeypatch) -> None:
    """Sequences of two padded lengths, so many of the shorter ones at a time."""
    monkeypatch.setattr(scoring, "LOGITS", 2048 * 64 * rows)
    rng, messages = np.random.default_rng(2), []
    pairs = [(c, rng.integers(0, 2048, 1 + i % 3).tolist()) for i, c in enumerate(contexts * 2)]
    scores = likelihoods(tiny, pairs, messages.append)
    for (prefix, target), score in zip(pairs, scores, strict=True):
        logprob, greedy = expected(tiny, prefix, target)
        assert score.logprob == pytest.approx(logprob, abs=2e-4)
        assert (score.greedy, score.tokens) == (greedy, len(target))
        assert score.mean == score.logprob / len(target)
    assert len(messages) == batches


@pytest.mark.slow
def test_teacher_forced_exact_match_is_greedy_decoding(tiny, contexts) -> None:
    """Decoded continuations match; with any one token changed they do not."""
    texts = [c.tokens for c in tiny.generate(contexts, max_new_tokens=5, ignore_eos=True)]
    changed = [[(token + (i == n % 5)) % 2048 for i, token in enumerate(row)] for n, row in enumerate(texts)]
    scores = likelihoods(tiny, list(zip(contexts * 2, texts + changed, strict=True)))
    assert [score.greedy for score in scores] == [True] * 6 + [False] * 6


def test_items_are_scored_by_decoding_and_mean_likelihood(tiny) -> None:
    model, prompt = tiny.model, "Return a list of"
    start = first_token(model)
    assert start == 0  # <|endoftext|>: this tokenizer begins no text by itself
    [completion] = tiny.generate([[start, *model.encode(prompt)]], max_new_tokens=1)
    likely, unlikely, long = completion.text, " zebra", " zebra zebra zebra"
    pairs = [([start, *model.encode(prompt)], model.encode(choice)) for choice in (unlikely, long)]
    short_one, long_one = likelihoods(tiny, pairs)
    assert short_one.logprob > long_one.logprob
    assert short_one.mean < long_one.mean  # a word that stood before is likelier again
    items = [
        Item(prompt, (likely,)),
        Item(prompt, (unlikely,)),
        Item(prompt, (likely, unlikely)),
        Item(prompt, (likely, unlikely), 1),
        Item(prompt, (unlikely, long), 1),
        Item(prompt, (likely, likely), 1),  # of equals the first
    ]
    answers = answered(tiny, items)
    assert answers.right.tolist() == [True, False, True, False, True, False]
    assert answers.tokens == sum(
        1 + len(model.encode(prompt)) + len(model.encode(choice)) - 1
        for item in items
        for choice in item.choices
    )


@pytest.mark.parametrize(
    ("pair", "message"),
    [
        (([], [1]), "a context or continuation is empty"),
        (([1], []), "a context or continuation is empty"),
        (([1] * 512, [2, 3]), "512 tokens and 2 after them exceed the context of 512"),
        (([1], [2048, 1]), r"expected \[0, 2048\)"),
    ],
)
def test_unscorable_requests_are_refused(tiny, pair, message) -> None:
    with pytest.raises(CmxError, match=message):
        likelihoods(tiny, [([1], [2]), pair])


def test_evaluation_without_tokenizer_is_refused(tmp_path: Path) -> None:
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).symlink_to(BASE / name)
    with pytest.raises(CmxError, match=r"no tokenizer\.json"):
        answered(cmx_jax.from_pretrained(tmp_path, ranks=2), [Item("a", ("b",))])
