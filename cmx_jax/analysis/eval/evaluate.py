"""`cmx eval`: runs the parts of a suite for one model or two."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Int

from cmx_jax.analysis.eval.heldout_text import evaluate_text, read_text
from cmx_jax.analysis.eval.results import (
    Change,
    Evaluation,
    ModelDescription,
    Score,
    SkillScore,
    SkillsResult,
)
from cmx_jax.analysis.eval.score import Answers, Progress, answered
from cmx_jax.analysis.eval.skills import SKILLS, Item, Skill
from cmx_jax.analysis.eval.statistics import Pairs, difference, mcnemar, wilson
from cmx_jax.errors import CmxError
from cmx_jax.model.checkpoint.inspect import inspect
from cmx_jax.serving.deploy.llm import LLM

SUITES = {"skills": ("skills",), "text": ("text",), "all": ("skills", "text")}
HARNESS = "lm-eval:"
MAX_ITEMS = 10_000  # per skill: every skill has that many different items


def parts_of(suite: str) -> tuple[str, ...]:
    """Parts of a suite: `skills`, `text`, or tasks of the harness, each as `lm-eval:TASK`.

    Raises:
      CmxError: The suite is unknown.
    """
    tasks = suite.removeprefix(HARNESS).split(",") if suite.startswith(HARNESS) else []
    if tasks and all(tasks):
        return tuple(HARNESS + task for task in tasks)
    if suite not in SUITES:
        raise CmxError(f"suite {suite!r} is unknown, expected one of {list(SUITES)} or {HARNESS}TASK[,TASK]")
    return SUITES[suite]


def check(suite: str, items: int, seed: int, text: str | None, window: int | None) -> None:
    """Checks all arguments that can be checked without a model.

    Raises:
      CmxError: An argument is unknown or out of range, or the suite does not use it.
    """
    parts = parts_of(suite)
    if not 1 <= items <= MAX_ITEMS:
        raise CmxError(f"items is {items}, expected 1 to {MAX_ITEMS}")
    if seed < 0:
        raise CmxError(f"seed is {seed}, expected zero or more")
    if "text" not in parts and (text is not None or window is not None):
        argument = "a text" if text is not None else "a window"
        raise CmxError(
            f"suite {suite!r} reads no text, but {argument} is given: expected suite 'text' or 'all'"
        )
    if "text" in parts and text is not None:
        read_text(text)
    if suite.startswith(HARNESS):
        from cmx_jax.analysis.eval.harness import check_installed

        check_installed()


def evaluate(
    llm: LLM,
    other: LLM | None = None,
    *,
    suite: str = "all",
    items: int = 200,
    seed: int = 0,
    text: str | None = None,
    window: int | None = None,
    progress: Progress = lambda _: None,
) -> Evaluation:
    """Evaluates a model, or compares a second one with it on the same items.

    Args:
      llm: The model.
      other: Second model to compare, such as the same model quantised; None: no comparison.
      suite: `skills`, `text`, `all` of these, or `lm-eval:TASK[,TASK]`.
      items: Number of items per skill, or of documents per harness task (the first ones).
      seed: Seed of the skills' items.
      text: UTF-8 file; None: the held-out documentation that ships with Python.
      window: Tokens per window of text; None: 256, or the model's context if that is shorter.
      progress: Callback for messages about the progress.

    Raises:
      CmxError: An argument cannot be used, or the models cannot be compared.
    """
    check(suite, items, seed, text, window)
    parts = parts_of(suite)
    if other is not None:
        _check_comparable(llm, other)
    described = describe(llm), None if other is None else describe(other)
    skills = evaluate_skills(llm, other, SKILLS, items, seed, progress) if "skills" in parts else None
    losses = evaluate_text(llm, other, read_text(text), window, progress) if "text" in parts else None
    tasks = [part.removeprefix(HARNESS) for part in parts if part.startswith(HARNESS)]
    benchmarks = None
    if tasks:
        from cmx_jax.analysis.eval.harness import run_tasks

        benchmarks = run_tasks(llm, other, tasks, items)
    return Evaluation(suite, *described, skills, losses, benchmarks)


def _check_comparable(llm: LLM, other: LLM) -> None:
    models = llm.model, other.model
    texts = [None if model.tokenizer is None else model.tokenizer.to_str() for model in models]
    sizes = [model.config.vocab_size for model in models]
    if texts[0] != texts[1] or sizes[0] != sizes[1]:
        raise CmxError(
            f"{llm.model.directory} and {other.model.directory} have different tokenizers or vocabularies: "
            "their answers cannot be compared, expected the same"
        )


def describe(llm: LLM) -> ModelDescription:
    """Describes a model's storage (parameters by type), arithmetic and layout on ranks."""
    stored: dict[str, int] = {}
    for row in inspect(llm.model.directory).groups:
        stored[row.scheme] = stored.get(row.scheme, 0) + row.parameters
    layout = llm.instance.layout
    return ModelDescription(
        name=llm.model.directory.name,
        path=str(llm.model.directory),
        stored=stored,
        dtype=llm.model.dtype,
        runner=llm.instance.name,
        ranks=layout.ranks,
        slots=layout.slots,
        exchange=layout.exchange,
        wire=layout.wire,
    )


def evaluate_skills(
    llm: LLM, other: LLM | None, skills: Sequence[Skill], count: int, seed: int, progress: Progress
) -> SkillsResult:
    """Computes the accuracy in each skill and on average, and its change with a second model.

    Args:
      llm: The model.
      other: Second model that answers the same items; None: no comparison.
      skills: Skills to run.
      count: Number of items per skill.
      seed: Seed of the items.
      progress: Callback for messages about the progress.
    """
    items: list[Item] = [item for skill in skills for item in skill.items(seed, count)]
    answers = answered(llm, items, progress)
    other_answers = None if other is None else answered(other, items, progress)
    parts = np.split(np.arange(len(items)), len(skills))
    return SkillsResult(
        seed=seed,
        items_per_skill=count,
        items=len(items),
        tokens=answers.tokens,
        by_skill=[
            SkillScore(skill.name, skill.about, skill.chance, count, _score(answers, other_answers, part))
            for skill, part in zip(skills, parts, strict=True)
        ],
        mean=_score(answers, other_answers, np.arange(len(items))),
    )


def _score(answers: Answers, other: Answers | None, part: Int[np.ndarray, " items"]) -> Score:
    """Accuracies and their difference on some of the items, given by their indices."""
    right = answers.right[part]
    accuracy = wilson(int(right.sum()), len(right))
    if other is None:
        return Score(accuracy)
    pairs = Pairs.of(right, other.right[part])
    change = Change(
        accuracy_against=wilson(pairs.both + pairs.second, pairs.count),
        right_to_wrong=pairs.first,
        wrong_to_right=pairs.second,
        difference=difference(pairs),
        p_value=mcnemar(pairs),
    )
    return Score(accuracy, change)
