"""Sixteen kinds of questions: their answers, found again by other means, and what guessing gets."""

import json
import re
from collections import Counter
from functools import cache

import numpy as np
import pytest
from tokenizers import Tokenizer

import cmx_jax
from cmx_jax.analysis.eval.skills import EVAL_ITEMS, SKILLS, Item, Skill, prose
from cmx_jax.serving.deploy.model import locate

BY_NAME = {skill.name: skill for skill in SKILLS}
ALPHABET = "abcdefghijklmnopqrstuvwxyz"
each_skill = pytest.mark.parametrize("skill", SKILLS, ids=lambda skill: skill.name)


@cache
def items_of(skill: Skill) -> list[Item]:
    return skill.items()


def right(item: Item) -> str:
    return item.choices[item.answer].strip()


def alike(item: Item) -> list[str]:
    """Answers for a guesser: the choices, or the digits shown if the answer is one, or the letters."""
    if len(item.choices) > 1:
        return [choice.strip() for choice in item.choices]
    return re.findall(r"\b[0-9]\b" if right(item).isdigit() else r"\b[a-z]\b", item.prompt) or [""]


def closed(text: str) -> str:
    """Cuts out pairs until none is left, rather than using a stack."""
    text = "".join(x for x in text if x in "()[]{}")
    while (shorter := re.sub(r"\(\)|\[\]|\{\}", "", text)) != text:
        text = shorter
    return " ".join(text[::-1].translate(str.maketrans("([{", ")]}")))


def replaced(text: str) -> str:
    old, new, letters = re.fullmatch(r"(\w) by (\w) in (.*)", text).groups()
    return letters.replace(old, new)


def continued(text: str) -> str:
    """The shortest repeated beginning of which the text is made goes on."""
    letters = text.replace(" ", "")
    period = next(n for n in range(1, len(letters)) if (letters[:n] * len(letters)).startswith(letters))
    return " ".join((letters[:period] * 9)[len(letters) :][:3])


def odd(text: str) -> str:
    """The only word that is of another kind than most, by regular expressions."""
    kinds = ("[a-z]", "[A-Z]", "[0-9]", "[a-z]{2,}")
    kind = {word: next(k for k in kinds if re.fullmatch(k, word)) for word in text.split()}
    [common, _] = [k for k, _ in Counter(kind.values()).most_common()]
    [word] = [word for word in kind if kind[word] != common]
    return word


CHECKS = {  # the words between the skill's name and the arrow -> the answer
    "copy": lambda text: text,
    "reverse": lambda text: text[::-1],
    "sort": lambda text: " ".join(x for x in ALPHABET for _ in range(text.count(x))),
    "after": lambda text: text.translate(str.maketrans(ALPHABET, ALPHABET[1:] + "a")),
    "replace": replaced,
    "unique": lambda text: " ".join(sorted(set(text) - {" "}, key=text.index)),
    "pattern": continued,
    "recall": lambda text: re.search(rf"\b{text[-1]} (\d)", text).group(1),
    "item": lambda text: text.split(" of ")[1][2 * int(text[0])],
    "count": lambda text: str(text[4:].replace("in", "").count(text[0])),
    "sum": lambda text: str(eval(text.replace(" ", "+"))),
    "close": closed,
    "odd": odd,
    "member": lambda text: "yes" if text[0] in text[5:] else "no",
}


def test_there_are_sixteen_different_skills() -> None:
    assert len(SKILLS) == len(BY_NAME) == len({skill.about for skill in SKILLS}) == 16
    assert len({skill.items(count=1)[0].prompt.split()[0] for skill in SKILLS}) == 16


@each_skill
@pytest.mark.slow
def test_items_depend_on_seed_only(skill: Skill) -> None:
    items = items_of(skill)
    assert items == skill.items(0, EVAL_ITEMS)
    assert items[:50] == skill.items(count=50)
    assert len({item.prompt for item in items}) == EVAL_ITEMS
    other = {item.prompt for item in skill.items(1)}
    assert len(other.intersection(item.prompt for item in items)) < EVAL_ITEMS / 3


@each_skill
def test_skills_answers_are_right(skill: Skill) -> None:
    for item in items_of(skill):
        if skill.name == "compare":
            name, *words = item.prompt.removesuffix(" ->").split()
            assert right(item) == str({"largest": max, "smallest": min}[name](map(int, words)))
            assert [choice.strip() for choice in item.choices] == words
        elif skill.name == "prose":
            assert item.prompt + item.choices[item.answer] in " ".join(prose())
        else:
            text = re.fullmatch(rf"{skill.name} (.*) ->", item.prompt).group(1)
            assert right(item) == CHECKS[skill.name](text), item


@each_skill
def test_choices_begin_with_a_space_end_and_are_there_once(skill: Skill) -> None:
    for item in items_of(skill):
        assert len(set(item.choices)) == len(item.choices)
        assert 0 <= item.answer < len(item.choices)
        for choice in item.choices:
            assert re.fullmatch(r"( \S+)+" + ("" if skill.name == "prose" else "\n"), choice)
        assert item.prompt.isascii()
        assert item.prompt == item.prompt.strip()


@each_skill
def test_chance_is_what_guessing_gets(skill: Skill) -> None:
    """Guesses the likeliest answer, or a random one of those that are shown."""
    items, rng = items_of(skill), np.random.default_rng(9)
    likeliest = max(Counter(map(right, items)).values()) / len(items)
    shown = np.mean([rng.choice(alike(item)) == right(item) for item in items])
    assert skill.chance == pytest.approx(max(likeliest, shown), abs=0.04)


@each_skill
def test_difficulty_varies(skill: Skill) -> None:
    lengths = Counter(len(item.prompt.split()) for item in items_of(skill))
    assert len([n for n in lengths.values() if n >= EVAL_ITEMS / 50]) >= 3


def test_prompts_and_answers_are_tokenised_apart_and_fit() -> None:
    tokenizer = Tokenizer.from_file(str(locate("tiny") / "tokenizer.json"))
    items = [item for skill in SKILLS for item in skill.items(count=200)]
    texts = [text for item in items for text in (item.prompt, item.choices[item.answer])]
    ids = [e.ids for e in tokenizer.encode_batch(texts)]
    both = tokenizer.encode_batch([a + b for a, b in zip(texts[::2], texts[1::2], strict=True)])
    assert [e.ids for e in both] == [a + b for a, b in zip(ids[::2], ids[1::2], strict=True)]
    assert max(len(e.ids) for e in both) <= 64


@pytest.mark.slow
def test_shipped_model_answers_equal_its_report() -> None:
    """Well above chance in at least twelve skills; three of them are asked here, as a user would."""
    report = json.loads((locate("tiny") / "training.json").read_text())["skills"]["accuracy_percent"]
    assert list(report) == list(BY_NAME)
    assert sum(report[name] > 100 * BY_NAME[name].chance + 25 for name in BY_NAME) >= 12
    llm = cmx_jax.from_pretrained("tiny", ranks=1, max_num_seqs=20, max_model_len=64)
    for name in ("copy", "after", "sum"):
        items = BY_NAME[name].items(count=20)
        written = llm.generate(["<|endoftext|>" + item.prompt for item in items], max_new_tokens=12)
        hits = [out.text.startswith(item.choices[0]) for out, item in zip(written, items, strict=True)]
        assert np.mean(hits) > report[name] / 100 - 0.2
