"""Questions and prose as rows of tokens: what the tiny model learns skills from, and is measured with."""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from tokenizers import Tokenizer

from cmx_jax.analysis.eval.skills import SKILLS, Item

HARD = ("replace", "unique", "pattern", "recall", "count", "sum", "compare", "member")  # learnt last
END = 0  # the id of the end-of-text token
TRAINING = 1  # a draw is of (seed, step) in the other stages: one more number keeps these draws apart


class Packed(NamedTuple):
    """Sequences behind each other in rows, all arrays [B, T]."""

    tokens: Any  # int32
    positions: Any  # int32, of each token in its sequence
    begin: Any  # int32, where in the row its sequence begins
    asked: Any  # bool: the token is to be predicted


class Question(NamedTuple):
    """A prompt with one of its choices."""

    tokens: list[int]  # what stands before (an end-of-text token), the prompt, the choice
    asked: int  # tokens of the choice, the last ones


def questions(
    pairs: list[tuple[str, str]], tokenizer: Tokenizer, rng: np.random.Generator | None = None
) -> list[Question]:
    """Prompts and choices, tokenised apart as they are when a question is asked, behind an end-of-text token.

    rng: leaves that token out of half of them, so that a model answers with and without.
    """
    ids = [e.ids for e in tokenizer.encode_batch([text for pair in pairs for text in pair])]
    before = np.ones(len(pairs), int) if rng is None else rng.integers(0, 2, len(pairs))
    return [
        Question([END] * n + prompt + choice, len(choice))
        for n, prompt, choice in zip(before, ids[::2], ids[1::2], strict=True)
    ]


def pack(rows: list[list[Question]], length: int) -> Packed:
    """Questions of which each list fits into a row; what is left is padding, part of no sequence."""
    shape = len(rows), length
    packed = Packed(
        np.full(shape, END, np.int32), np.full(shape, -1, np.int32), np.zeros(shape, np.int32),
        np.zeros(shape, bool),
    )  # fmt: skip
    for i, row in enumerate(rows):
        at = 0
        for tokens, asked in row:
            end = at + len(tokens)
            packed.tokens[i, at:end] = tokens
            packed.positions[i, at:end] = np.arange(len(tokens))
            packed.begin[i, at:end] = at
            packed.asked[i, end - asked : end] = True
            at = end
        packed.begin[i, at:] = at
    return packed


def lay_out(asked: list[Question], length: int) -> list[list[Question]]:
    """Questions in their order, as many to a row as fit."""
    rows: list[list[Question]] = []
    room = 0
    for question in asked:
        if len(question.tokens) > room:
            rows.append([])
            room = length
        rows[-1].append(question)
        room -= len(question.tokens)
    return rows


def prose_rows(windows: np.ndarray) -> Packed:
    """Windows of text [B, T], each one sequence, all of it to be predicted."""
    positions = np.broadcast_to(np.arange(windows.shape[1], dtype=np.int32), windows.shape)
    return Packed(windows, positions, np.zeros_like(windows), np.ones(windows.shape, bool))


class Mixture:
    """Batches of prose and questions, each a function of seed, cycle and step alone: resuming is exact.

    In the first cycle all skills are asked equally often, then the hard ones three times as often as the
    others. The skill `prose` is learnt from the prose. No question is one of the default evaluation sets'.
    """

    def __init__(
        self, stream: np.ndarray, tokenizer: Tokenizer, seed: int, batch: int, length: int, prose: int
    ) -> None:
        self.stream, self.tokenizer, self.seed = stream, tokenizer, seed
        self.batch_size, self.length, self.prose = batch, length, prose
        self.skills = [skill for skill in SKILLS if skill.name != "prose"]
        self.refused = {item.prompt for skill in self.skills for item in skill.items()}

    def batch(self, step: int, cycle: int) -> Packed:
        """`prose` rows of text, the others of questions."""
        rng = np.random.default_rng((self.seed, step, TRAINING + cycle))
        starts = rng.integers(0, len(self.stream) - self.length, self.prose)
        windows = np.stack([self.stream[s : s + self.length] for s in starts])
        count = self.batch_size - self.prose
        rows: list[list[Question]] = []
        while len(rows) <= count:  # the last one may not be full
            rows += lay_out(questions(self.drawn(rng, 20 * count, cycle), self.tokenizer, rng), self.length)
        parts = prose_rows(windows), pack(rows[:count], self.length)
        return Packed(*(np.concatenate(pair) for pair in zip(*parts, strict=True)))

    def drawn(self, rng: np.random.Generator, count: int, cycle: int) -> list[tuple[str, str]]:
        """Prompts and right answers, of all skills."""
        asked = [skill for skill in self.skills for _ in range(3 if cycle and skill.name in HARD else 1)]
        pairs: list[tuple[str, str]] = []
        while len(pairs) < count:
            item = asked[rng.integers(len(asked))].make(rng)
            if item.prompt not in self.refused:
                pairs.append((item.prompt, item.choices[item.answer]))
        return pairs


def accuracy(
    run: Callable[[Packed], tuple[Any, Any]],
    items: list[Item],
    tokenizer: Tokenizer,
    batch: int,
    length: int,
) -> float:
    """Percentage of right answers.

    run: each next token's cross-entropy and whether it is what greedy decoding says, both [B, T - 1].
    Greedy decoding writes an answer exactly if it says each of its tokens behind those before it.
    """
    pairs = [(item.prompt, choice) for item in items for choice in item.choices]
    rows = lay_out(questions(pairs, tokenizer), length)
    scores: list[tuple[float, bool]] = []
    for first in range(0, len(rows), batch):
        part = rows[first : first + batch]
        packed = pack(part + [[]] * (batch - len(part)), length)
        entropy, hit = (np.asarray(x) for x in run(packed))
        for i, row in enumerate(part):
            end = -1  # the prediction of a token stands one place before it
            for tokens, asked in row:
                end += len(tokens)
                scores.append((entropy[i, end - asked : end].mean(), hit[i, end - asked : end].all()))
    right, at = 0, 0
    for item in items:
        entropies, hits = zip(*scores[at : at + len(item.choices)], strict=True)
        right += hits[0] if len(hits) == 1 else int(np.argmin(entropies) == item.answer)
        at += len(item.choices)
    return round(100 * float(right) / len(items), 1)
