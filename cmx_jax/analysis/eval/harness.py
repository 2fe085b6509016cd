"""A model for lm-evaluation-harness (the extra `lm-eval`), and `cmx eval --suite lm-eval:TASK`.

The entry point `cmx` of the group `lm_eval.models` names `CmxLM`, so that a harness that reads entry points
finds it as `lm-eval run --model cmx --model_args pretrained=tiny` (its docs/plugins.md; 0.4.13 and older read
none). `cmx eval` hands it over as an object, which every version takes.
"""

import importlib.metadata
import os
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from cmx_jax.analysis.eval.results import HarnessResult, Metrics
from cmx_jax.analysis.eval.score import first_token, likelihoods
from cmx_jax.errors import CmxError
from cmx_jax.serving.deploy.llm import LLM, from_pretrained

try:  # heavy, and only where the extra is installed
    from lm_eval.api.model import LM

    INSTALLED = True
except ImportError:
    LM, INSTALLED = object, False

TASKS = Path(__file__).parent / "tasks"
MAX_NEW_TOKENS = 256  # default of the harness for requests without `max_gen_toks`


class CmxLM(LM):  # type: ignore[misc]
    """A model with the interface of the harness. Requests carry their arguments as the tuple `args`."""

    def __init__(self, pretrained: str | Path | LLM, **options: Any):
        """Takes a loaded model, or arguments of `from_pretrained`; the harness's own options are ignored."""
        super().__init__()
        for name in ("batch_size", "max_batch_size", "device"):
            options.pop(name, None)
        self.llm = pretrained if isinstance(pretrained, LLM) else from_pretrained(pretrained, **options)
        self.model = self.llm.model
        self.context = self.llm.max_model_len

    def loglikelihood(self, requests: Sequence[Any], **_: Any) -> list[tuple[float, bool]]:
        """Log-likelihood (nats) of each continuation after its context, and whether it is the greedy one."""
        scores = likelihoods(self.llm, [self._pair(*request.args) for request in requests])
        return [(score.logprob, score.greedy) for score in scores]

    def _pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        """Token ids of context and continuation.

        As in the harness's own models, both are encoded together, spaces at the context's end belong to the
        continuation, and a sequence that is too long loses its beginning.
        """
        stripped, text = context.rstrip(), context + continuation
        if not stripped:
            prefix, target = [first_token(self.model)], self.model.encode(text, special=False)
        else:
            prefix = self.model.encode(stripped)
            target = self.model.encode(text)[len(prefix) :]
        room = self.context + 1 - len(target)  # the last token is not run
        if room < 1:
            raise CmxError(f"a continuation of {len(target)} tokens exceeds the context of {self.context}")
        return prefix[-room:], target

    def loglikelihood_rolling(self, requests: Sequence[Any], **_: Any) -> list[float]:
        """Log-likelihood (nats) of each complete text, in as few windows as its length needs."""
        texts = [list(self._rolling(request.args[0])) for request in requests]
        scores = iter(likelihoods(self.llm, [window for windows in texts for window in windows]))
        return [sum(next(scores).logprob for _ in windows) for windows in texts]

    def _rolling(self, text: str) -> Iterator[tuple[list[int], list[int]]]:
        """Windows that predict each token once; all except the first, even the last, have full contexts."""
        tokens, size = self.model.encode(text, special=False), self.context
        for start in range(0, len(tokens), size):
            stop = min(start + size, len(tokens))
            prefix = tokens[max(stop - size - 1, 0) : start] if start else [first_token(self.model)]
            yield prefix, tokens[start:stop]

    def generate_until(self, requests: Sequence[Any], **_: Any) -> list[str]:
        """Continuations, each cut before the first of its stop strings; greedy unless `do_sample` is set."""
        groups: dict[tuple[Any, ...], list[int]] = defaultdict(list)
        times: dict[tuple[Any, ...], int] = defaultdict(int)
        for i, request in enumerate(requests):
            key = (request.args[0], *_sampling(request.args[1]))
            drawn = dict(key[1:])["temperature"] > 0
            groups[*key[1:], ("seed", times[key] if drawn else 0)].append(i)
            times[key] += 1  # a repeated prompt gets another sample
        texts = [""] * len(requests)
        for params, rows in groups.items():
            options: dict[str, Any] = dict(params)
            prompts = [self._prompt(requests[i].args[0], options["max_new_tokens"]) for i in rows]
            for i, completion in zip(rows, self.llm.generate(prompts, **options), strict=True):
                texts[i] = _until(completion.text, requests[i].args[1].get("until"))
        return texts

    def _prompt(self, text: str, new: int) -> list[int]:
        """Token ids of a prompt, without its beginning if `new` tokens would exceed the context."""
        if new >= self.context:
            raise CmxError(f"max_gen_toks is {new}, expected less than the context of {self.context}")
        return (self.model.encode(text) or [first_token(self.model)])[-(self.context - new) :]


def _sampling(kwargs: dict[str, Any]) -> tuple[tuple[str, Any], ...]:
    """Converts the harness's generation arguments to those of `generate`."""
    sampled = kwargs.get("do_sample", False)
    return (
        ("max_new_tokens", int(kwargs.get("max_gen_toks", MAX_NEW_TOKENS))),
        ("temperature", float(kwargs.get("temperature", 1.0)) if sampled else 0.0),
        ("top_k", int(kwargs.get("top_k", 0)) if sampled else 0),
        ("top_p", float(kwargs.get("top_p", 1.0)) if sampled else 1.0),
    )


def _until(text: str, stops: str | Sequence[str] | None) -> str:
    """The text before the first stop string."""
    for stop in [stops] if isinstance(stops, str) else stops or ():
        text = text.split(stop, 1)[0] if stop else text
    return text


def check_installed() -> None:
    """Checks that the harness is installed.

    Raises:
      CmxError: The harness is not installed.
    """
    if not INSTALLED:
        raise CmxError("lm-evaluation-harness is not installed: pip install 'cmx_jax[lm-eval]'")


def run_tasks(llm: LLM, other: LLM | None, tasks: Sequence[str], limit: int) -> HarnessResult:
    """Runs tasks of the harness for one or two models.

    Args:
      llm: The model.
      other: Second model; None: no comparison.
      tasks: Names of tasks or groups of the harness, or of the tasks in `tasks/`.
      limit: Number of documents per task, the first ones.

    Raises:
      CmxError: The harness is not installed, does not know a task, or fails.
    """
    check_installed()
    from lm_eval.evaluator import simple_evaluate
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=str(TASKS))
    for task in tasks:
        if task not in manager.all_tasks:
            raise CmxError(f"lm-evaluation-harness has no task {task!r}: see lm-eval ls tasks")

    def run(model: LLM) -> Metrics:
        try:
            evaluation = simple_evaluate(
                CmxLM(model),
                tasks=list(tasks),
                limit=limit,
                task_manager=manager,
                bootstrap_iters=0,
                log_samples=False,
                confirm_run_unsafe_code=os.environ.get("HF_ALLOW_CODE_EVAL") == "1",
            )
        except CmxError:
            raise
        except Exception as error:  # no network, a licence not agreed to, code not allowed to run: any type
            raise CmxError(f"lm-evaluation-harness: {type(error).__name__}: {error}") from error
        return {
            name: {metric: _number(value) for metric, value in metrics.items()}
            for name, metrics in evaluation["results"].items()
        }

    return HarnessResult(
        version=importlib.metadata.version("lm_eval"),
        limit=limit,
        model=run(llm),
        against=None if other is None else run(other),
    )


def _number(value: Any) -> float | int | str:
    """Converts NumPy's numbers to Python's, and values that are neither numbers nor text to text."""
    value = getattr(value, "item", lambda: value)()
    return value if isinstance(value, str | int | float) else str(value)
