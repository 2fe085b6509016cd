"""Sixteen skills, generated from a seed, that a small model can learn: questions with known answers.

A question is asked zero-shot: an end-of-text token, the prompt, and then one of its choices. Prompts end in
`->` and choices begin with a space, so both are tokenised apart. Choices end in a newline: a model has to
know where an answer stops. Only `prose` has no such end, since its choices are pieces of text.

The only file that is read is `prose.txt`, which was written for this purpose and is in no corpus. So
questions depend only on the seed, not on the version of Python (on NumPy's only if it ever changes how
`Generator` draws).
"""

import zlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from string import ascii_lowercase, ascii_uppercase

import numpy as np

Rng = np.random.Generator

EVAL_SEED = 0
EVAL_ITEMS = 1000  # per skill; no training may see the items of `EVAL_SEED`
LETTERS = tuple(ascii_lowercase)
CLOSING = {"(": ")", "[": "]", "{": "}"}
KINDS = (
    LETTERS,
    tuple(ascii_uppercase),
    tuple("0123456789"),
    ("list", "name", "file", "string", "class", "value", "object", "type", "code", "error", "line", "test"),
)


@dataclass(frozen=True)
class Item:
    """A question.

    Attributes:
      prompt: Text before the answer.
      choices: Possible answers. Greedy decoding must write a single choice exactly; among several, the
        model's answer is the one with the highest mean log-likelihood per token.
      answer: Index of the correct choice.
    """

    prompt: str
    choices: tuple[str, ...]
    answer: int = 0


@dataclass(frozen=True)
class Skill:
    """A kind of question.

    Attributes:
      name: Name of the skill.
      about: Description of the correct answer.
      chance: Accuracy of the most frequent answer, or of a random one of those that are shown.
      make: Function that draws an item.
    """

    name: str
    about: str
    chance: float
    make: Callable[[Rng], Item]

    def items(self, seed: int = EVAL_SEED, count: int = EVAL_ITEMS) -> list[Item]:
        """`count` questions with different prompts; a smaller count gives the beginning of the same list."""
        items: dict[str, Item] = {}
        for index in range(count):
            rng = np.random.default_rng((seed, zlib.crc32(self.name.encode()), index))
            item = self.make(rng)
            while item.prompt in items:
                item = self.make(rng)
            items[item.prompt] = item
        return list(items.values())


def _ask(words: Iterable[object], *choices: object, answer: int = 0) -> Item:
    """The question in `words`, separated by spaces."""
    return Item(f"{' '.join(map(str, words))} ->", tuple(f" {c}\n" for c in choices), answer)


def _some(rng: Rng, low: int, high: int, pool: Iterable[str] = LETTERS, repeat: bool = False) -> list[str]:
    """Draws `low` to `high` elements of the pool, in any order, with replacement if `repeat`."""
    count = rng.integers(low, high + 1)
    return [str(x) for x in rng.choice(list(pool), count, replace=repeat)]


def _copy(rng: Rng) -> Item:
    letters = _some(rng, 2, 9)
    return _ask(["copy", *letters], " ".join(letters))


def _reverse(rng: Rng) -> Item:
    letters = _some(rng, 2, 7)
    return _ask(["reverse", *letters], " ".join(letters[::-1]))


def _sort(rng: Rng) -> Item:
    letters = _some(rng, 2, 7)
    return _ask(["sort", *letters], " ".join(sorted(letters)))


def _after(rng: Rng) -> Item:
    letters = _some(rng, 2, 6)
    following = [LETTERS[(LETTERS.index(x) + 1) % len(LETTERS)] for x in letters]
    return _ask(["after", *letters], " ".join(following))


def _replace(rng: Rng) -> Item:
    old, new, *rest = _some(rng, 3, 5)
    letters = _some(rng, 2, 7, [old, *rest], repeat=True)
    edited = [new if x == old else x for x in letters]
    return _ask(["replace", old, "by", new, "in", *letters], " ".join(edited))


def _unique(rng: Rng) -> Item:
    letters = _some(rng, 3, 7, _some(rng, 2, 5), repeat=True)
    return _ask(["unique", *letters], " ".join(dict.fromkeys(letters)))


def _pattern(rng: Rng) -> Item:
    period = _some(rng, 2, 5)
    shown = 2 * len(period) + int(rng.integers(len(period)))
    letters = period * 4
    return _ask(["pattern", *letters[:shown]], " ".join(letters[shown : shown + 3]))


def _recall(rng: Rng) -> Item:
    keys = _some(rng, 2, 8)
    values = rng.permutation(10)[: len(keys)]
    index = rng.integers(len(keys))
    pairs = [word for key, value in zip(keys, values, strict=True) for word in (key, value)]
    return _ask(["recall", *pairs, ",", keys[index]], values[index])


def _item(rng: Rng) -> Item:
    letters = _some(rng, 2, 8)
    index = rng.integers(len(letters))
    return _ask(["item", index, "of", *letters], letters[index])


def _count(rng: Rng) -> Item:
    pool = _some(rng, 3, 3)
    letters = _some(rng, 3, 8, pool, repeat=True)
    return _ask(["count", pool[0], "in", *letters], letters.count(pool[0]))


def _sum(rng: Rng) -> Item:
    terms = rng.integers(0, 5, rng.integers(4, 7))
    return _ask(["sum", *terms], terms.sum())


def _close(rng: Rng) -> Item:
    """Opens brackets, closes some of them, with letters in between."""
    words: list[str] = []
    still: list[str] = []
    while not still:
        words, still = [], []
        for _ in range(rng.integers(2, 7)):
            if still and rng.random() < 0.3:
                words.append(still.pop())
            else:
                words.append(str(rng.choice(list(CLOSING))))
                still.append(CLOSING[words[-1]])
            words.extend(_some(rng, 0, 1))
    return _ask(["close", *words], " ".join(still[::-1]))


def _compare(rng: Rng) -> Item:
    numbers = rng.choice(np.arange(10, 100), rng.integers(2, 7), replace=False)
    name, best = (("largest", numbers.argmax()), ("smallest", numbers.argmin()))[rng.integers(2)]
    return _ask([name, *numbers], *numbers, answer=int(best))


def _odd(rng: Rng) -> Item:
    kind, other = rng.permutation(len(KINDS))[:2]
    words = _some(rng, 2, 6, KINDS[kind])
    place = int(rng.integers(len(words) + 1))
    words[place:place] = _some(rng, 1, 1, KINDS[other])
    return _ask(["odd", *words], *words, answer=place)


def _member(rng: Rng) -> Item:
    letter, *letters = _some(rng, 3, 9)
    absent = int(rng.integers(2))
    if not absent:
        letters[rng.integers(len(letters))] = letter
    return _ask(["member", letter, "in", *letters], "yes", "no", answer=absent)


@cache
def prose() -> tuple[str, ...]:
    """The words of `prose.txt`."""
    return tuple(Path(__file__).with_name("prose.txt").read_text(encoding="ascii").split())


def _prose(rng: Rng) -> Item:
    """Asks for the next four words of a text; wrong choices are four words from three other places."""
    words, length = prose(), int(rng.integers(8, 21))
    places = rng.choice(len(words) // 4 - 6, 4, replace=False) * 4 + 20 + rng.integers(4)
    answer = int(rng.integers(4))
    begin = places[answer]
    choices = tuple(" " + " ".join(words[p : p + 4]) for p in places)
    return Item(" ".join(words[begin - length : begin]), choices, answer)


SKILLS = (
    Skill("copy", "the letters again", 0.0, _copy),
    Skill("reverse", "the letters from the last to the first", 0.0, _reverse),
    Skill("sort", "the letters in the order of the alphabet", 0.0, _sort),
    Skill("after", "each letter's next one in the alphabet, a behind z", 0.0, _after),
    Skill("replace", "the letters with one of them replaced by another", 0.0, _replace),
    Skill("unique", "the letters without those that were there before", 0.02, _unique),
    Skill("pattern", "the next three letters of what repeats", 0.0, _pattern),
    Skill("recall", "the digit that stands behind a letter", 0.25, _recall),
    Skill("item", "the letter with this index, the first being 0", 0.25, _item),
    Skill("count", "how often a letter is there", 0.3, _count),
    Skill("sum", "the sum of digits", 0.11, _sum),
    Skill("close", "what closes the brackets that are open", 0.06, _close),
    Skill("compare", "the largest number, or the smallest", 0.29, _compare),
    Skill("odd", "what is of another kind: letters, capitals, digits, words", 0.22, _odd),
    Skill("member", "whether a letter is there", 0.5, _member),
    Skill("prose", "how a text goes on", 0.25, _prose),
)
