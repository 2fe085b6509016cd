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

from cmx_jax.analysis.eval.score import first_token, likelihoods
from cmx_jax.errors import CmxError
from cmx_jax.serving.deploy.llm import LLM, from_pretrained

try:  # heavy, and only where the extra is installed
    from lm_eval.api.model import LM

    INSTALLED = True
except ImportError:
    LM, INSTALLED = object, False

TASKS = Path(__file__).parent / "tasks"
MAX_NEW_TOKENS = 256  # of a request that does not say: the harness's own default


class CmxLM(LM):  # type: ignore[misc]
    """What the harness asks of a model. Requests carry their arguments as the tuple `args`."""

    def __init__(self, pretrained: str | Path | LLM, **options: Any):
        """Takes a loaded model, or what `from_pretrained` takes; the harness's own options are ignored."""
        super().__init__()
        for name in ("batch_size", "max_batch_size", "device"):
            options.pop(name, None)
        self.llm = pretrained if isinstance(pretrained, LLM) else from_pretrained(pretrained, **options)
        self.model = self.llm.model
        self.context = self.llm.max_model_len

    def loglikelihood(self, requests: Sequence[Any], **_: Any) -> list[tuple[float, bool]]:
        """Log-likelihood (nats) of each continuation behind its context, and whether it is the greedy one."""
        found = likelihoods(self.llm, [self._pair(*request.args) for request in requests])
        return [(of.logprob, of.greedy) for of in found]

    def _pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        """Token ids, cut where the context's end: as the harness's own models do, both are encoded together,
        spaces at the context's end belong to the continuation, and what is too long loses its beginning."""
        kept = context.rstrip()
        if not kept:
            before, behind = (
                [first_token(self.model)],
                self.model.encode(context + continuation, special=False),
            )
        else:
            before, whole = self.model.encode(kept), self.model.encode(context + continuation)
            behind = whole[len(before) :]
        room = self.context + 1 - len(behind)  # the last token is not run
        if room < 1:
            raise CmxError(f"a continuation of {len(behind)} tokens exceeds the context of {self.context}")
        return before[-room:], behind

    def loglikelihood_rolling(self, requests: Sequence[Any], **_: Any) -> list[float]:
        """Log-likelihood (nats) of each whole text, in as few windows as its length needs."""
        windows = [list(self._rolling(request.args[0])) for request in requests]
        found = iter(likelihoods(self.llm, [pair for of in windows for pair in of]))
        return [sum(next(found).logprob for _ in of) for of in windows]

    def _rolling(self, text: str) -> Iterator[tuple[list[int], list[int]]]:
        """Windows that predict each token once; all but the first have a full context, the last one too."""
        tokens, size = self.model.encode(text, special=False), self.context
        for start in range(0, len(tokens), size):
            stop = min(start + size, len(tokens))
            before = tokens[max(stop - size - 1, 0) : start] if start else [first_token(self.model)]
            yield before, tokens[start:stop]

    def generate_until(self, requests: Sequence[Any], **_: Any) -> list[str]:
        """Continuations, each cut before the first of its stop strings; greedy unless `do_sample` is set."""
        groups: dict[tuple[Any, ...], list[int]] = defaultdict(list)
        times: dict[tuple[Any, ...], int] = defaultdict(int)
        for i, request in enumerate(requests):
            key = (request.args[0], *_sampling(request.args[1]))
            drawn = dict(key[1:])["temperature"] > 0
            groups[*key[1:], ("seed", times[key] if drawn else 0)].append(i)
            times[key] += 1  # a prompt that is asked again gets another sample
        texts = [""] * len(requests)
        for params, rows in groups.items():
            options: dict[str, Any] = dict(params)
            prompts = [self._prompt(requests[i].args[0], options["max_new_tokens"]) for i in rows]
            for i, completion in zip(rows, self.llm.generate(prompts, **options), strict=True):
                texts[i] = _until(completion.text, requests[i].args[1].get("until"))
        return texts

    def _prompt(self, text: str, new: int) -> list[int]:
        """Token ids; what leaves no room for `new` tokens loses its beginning."""
        if new >= self.context:
            raise CmxError(f"max_gen_toks is {new}, expected less than the context of {self.context}")
        return (self.model.encode(text) or [first_token(self.model)])[-(self.context - new) :]


def _sampling(kwargs: dict[str, Any]) -> tuple[tuple[str, Any], ...]:
    """The harness's generation arguments as ours."""
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
    """Refuses to go on without the harness.

    Raises:
      CmxError: it is not installed.
    """
    if not INSTALLED:
        raise CmxError("lm-evaluation-harness is not installed: pip install 'cmx_jax[lm-eval]'")


def run_tasks(llm: LLM, other: LLM | None, tasks: Sequence[str], limit: int) -> dict[str, Any]:
    """What the harness finds for one or two models: its numbers by task and metric.

    Args:
      llm: the model.
      other: a second one, or None.
      tasks: names of the harness's tasks or groups, or of those in `tasks/`.
      limit: documents of each task, the first ones.

    Raises:
      CmxError: the harness is not installed, has no such task, or fails.
    """
    check_installed()
    from lm_eval.evaluator import simple_evaluate
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=str(TASKS))
    for task in tasks:
        if task not in manager.all_tasks:
            raise CmxError(f"lm-evaluation-harness has no task {task!r}: see lm-eval ls tasks")

    def run(of: LLM) -> dict[str, dict[str, Any]]:
        try:
            found = simple_evaluate(
                CmxLM(of),
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
            for name, metrics in found["results"].items()
        }

    return {
        "version": importlib.metadata.version("lm_eval"),
        "limit": limit,
        "model": run(llm),
        "against": None if other is None else run(other),
    }


def _number(value: Any) -> Any:
    """NumPy's numbers as Python's, what is neither a number nor text as text."""
    value = getattr(value, "item", lambda: value)()
    return value if isinstance(value, str | int | float) else str(value)
