"""`cmx eval`: what is run, and the result as one dictionary that `report.render` prints."""

from collections.abc import Sequence
from dataclasses import asdict, is_dataclass
from typing import Any

import numpy as np
from jaxtyping import Int

from cmx_jax.analysis.eval.score import Answers, Progress, answered
from cmx_jax.analysis.eval.skills import SKILLS, Item, Skill
from cmx_jax.analysis.eval.statistics import Pairs, difference, mcnemar, wilson
from cmx_jax.analysis.eval.text import evaluate_text, read_text
from cmx_jax.errors import CmxError
from cmx_jax.model.checkpoint.inspect import inspect
from cmx_jax.serving.deploy.llm import LLM

SUITES = {"skills": ("skills",), "text": ("text",), "all": ("skills", "text")}
HARNESS = "lm-eval:"
MAX_ITEMS = 10_000  # of a skill: all have so many different ones


def parts_of(suite: str) -> tuple[str, ...]:
    """What a suite consists of: `skills`, `text`, or tasks of the harness, each as `lm-eval:TASK`.

    Raises:
      CmxError: it is unknown.
    """
    tasks = suite.removeprefix(HARNESS).split(",") if suite.startswith(HARNESS) else []
    if tasks and all(tasks):
        return tuple(HARNESS + task for task in tasks)
    if suite not in SUITES:
        raise CmxError(f"suite {suite!r} is unknown, expected one of {list(SUITES)} or {HARNESS}TASK[,TASK]")
    return SUITES[suite]


def check(suite: str, items: int, seed: int, text: str | None, window: int | None) -> None:
    """Refuses what needs no model to be refused.

    Raises:
      CmxError: an argument is unknown or out of range, or would not be read.
    """
    parts = parts_of(suite)
    if not 1 <= items <= MAX_ITEMS:
        raise CmxError(f"items is {items}, expected 1 to {MAX_ITEMS}")
    if seed < 0:
        raise CmxError(f"seed is {seed}, expected zero or more")
    if "text" not in parts and (text is not None or window is not None):
        given = "a text" if text is not None else "a window"
        raise CmxError(f"suite {suite!r} reads no text, but {given} is given: expected suite 'text' or 'all'")
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
) -> dict[str, Any]:
    """Evaluates a model, or compares a second one with it on the same items.

    Args:
      llm: the model.
      other: what is compared with it, such as the same model quantised; or None.
      suite: `skills`, `text`, `all` of these, or `lm-eval:TASK[,TASK]`.
      items: of each skill; of each task of the harness its first.
      seed: of the skills' items.
      text: a UTF-8 file instead of the documentation that ships with Python.
      window: tokens of a window of text; None takes 256, or the model's context if that is shorter.
      progress: is told how far it is.

    Returns:
      Plain dictionaries, lists and numbers, as `cmx eval --json` prints them.

    Raises:
      CmxError: an argument cannot be used, or the models cannot be compared.
    """
    check(suite, items, seed, text, window)
    parts = parts_of(suite)
    if other is not None:
        _check_comparable(llm, other)
    result: dict[str, Any] = {"suite": suite, "model": described(llm)}
    result["against"] = None if other is None else described(other)
    if "skills" in parts:
        result["skills"] = evaluate_skills(llm, other, SKILLS, items, seed, progress)
    if "text" in parts:
        result["text"] = evaluate_text(llm, other, read_text(text), window, progress)
    tasks = [part.removeprefix(HARNESS) for part in parts if part.startswith(HARNESS)]
    if tasks:
        from cmx_jax.analysis.eval.harness import run_tasks

        result["lm_eval"] = run_tasks(llm, other, tasks, items)
    result["not_run"] = [name for name in ("skills", "text", "lm_eval") if name not in result]
    return _plain(result)


def _plain(value: Any) -> Any:
    """Estimates as dictionaries; what is infinite (no interval) as None."""
    if is_dataclass(value) and not isinstance(value, type):
        value = asdict(value)
    if isinstance(value, dict):
        return {key: _plain(of) for key, of in value.items()}
    if isinstance(value, list):
        return [_plain(of) for of in value]
    return None if isinstance(value, float) and value in (float("inf"), float("-inf")) else value


def _check_comparable(llm: LLM, other: LLM) -> None:
    tokenizers = [of.model.tokenizer for of in (llm, other)]
    texts = [None if tokenizer is None else tokenizer.to_str() for tokenizer in tokenizers]
    sizes = [of.model.config.vocab_size for of in (llm, other)]
    if texts[0] != texts[1] or sizes[0] != sizes[1]:
        raise CmxError(
            f"{llm.model.directory} and {other.model.directory} have different tokenizers or vocabularies: "
            "their answers cannot be compared, expected the same"
        )


def described(llm: LLM) -> dict[str, Any]:
    """What was run: how the model is stored (parameters by type), its arithmetic, how it lies on ranks."""
    stored: dict[str, int] = {}
    for row in inspect(llm.model.directory).groups:
        stored[row.scheme] = stored.get(row.scheme, 0) + row.parameters
    layout = llm.instance.layout
    return {
        "name": llm.model.directory.name,
        "path": str(llm.model.directory),
        "stored": stored,
        "dtype": llm.model.dtype,
        "runner": llm.instance.name,
        "ranks": layout.ranks,
        "slots": layout.slots,
        "exchange": layout.exchange,
        "wire": layout.wire,
    }


def evaluate_skills(
    llm: LLM, other: LLM | None, skills: Sequence[Skill], count: int, seed: int, progress: Progress
) -> dict[str, Any]:
    """Accuracy in each skill and on average, and what changes with a second model on the same items."""
    by_skill = [skill.items(seed, count) for skill in skills]
    items: list[Item] = [item for of in by_skill for item in of]
    answers = answered(llm, items, progress)
    others = None if other is None else answered(other, items, progress)
    rows, parts = [], np.split(np.arange(len(items)), len(skills))
    for skill, part in zip(skills, parts, strict=True):
        about = {"skill": skill.name, "about": skill.about, "chance": skill.chance, "items": count}
        rows.append(about | _row(answers, others, part))
    return {
        "seed": seed,
        "items_per_skill": count,
        "items": len(items),
        "tokens": answers.tokens,
        "by_skill": rows,
        "mean": _row(answers, others, np.arange(len(items))),  # as many items of each skill
    }


def _row(answers: Answers, others: Answers | None, part: Int[np.ndarray, " items"]) -> dict[str, Any]:
    """Accuracies and their difference on some of the items."""
    right = answers.right[part]
    row: dict[str, Any] = {"accuracy": wilson(int(right.sum()), len(right))}
    if others is not None:
        pairs = Pairs.of(right, others.right[part])
        row["accuracy_against"] = wilson(pairs.both + pairs.second, pairs.count)
        row["right_to_wrong"], row["wrong_to_right"] = pairs.first, pairs.second
        row["difference"], row["p_value"] = difference(pairs), mcnemar(pairs)
        row["falls"] = row["difference"].high < 0
    return row
