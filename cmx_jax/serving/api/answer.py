"""An answer while it grows: what completions and chat completions have in common."""

import time
import uuid
from collections.abc import AsyncIterator, Sequence
from typing import Any

from cmx_jax.serving.api.choice import Choice, Delta
from cmx_jax.serving.api.context import ApiContext
from cmx_jax.serving.api.schemas import Generate
from cmx_jax.serving.scheduling.request import SamplingParams
from cmx_jax.serving.service.generation import Generation


class Answer:
    """Choices `n` by `n` behind each prompt.

    Attributes:
      served: the model.
      prompts: token ids.
      n: choices of each.
      choices: all of them, in OpenAI's order.
      generation: where their tokens come from.
    """

    def __init__(
        self,
        served: ApiContext,
        body: Generate,
        kind: str,
        prompts: Sequence[list[int]],
        generation: Generation,
    ):
        self.served, self.prompts, self.generation = served, prompts, generation
        self.n = body.n or 1
        self.choices = [Choice(served.tokenizer, body.stop) for _ in range(len(prompts) * self.n)]
        self._head = {
            "id": f"{kind}-{uuid.uuid4().hex}",
            "created": int(time.time()),
            "model": served.name,
        }
        self._usage_in_stream = body.stream_options is not None and body.stream_options.include_usage

    @classmethod
    async def start(
        cls,
        served: ApiContext,
        body: Generate,
        kind: str,
        prompts: Sequence[list[int]],
        params: Sequence[SamplingParams],
    ) -> "Answer":
        """Submits all choices, whose parameters are given in order; with none, the prompts are the answer.

        Raises:
          CmxError: as `Service.generate`.
        """
        n = body.n or 1
        asked = [(prompts[i // n], of) for i, of in enumerate(params)]
        salt = body.cache_salt or ""
        generation = await served.service.generate(asked, priority=body.priority, namespace=salt)
        return cls(served, body, kind, prompts, generation)

    async def deltas(self) -> AsyncIterator[tuple[int, Delta]]:
        """What each choice grows by, as it comes.

        Raises:
          Interrupted: the service ended one of them.
        """
        async for chunk in self.generation:
            choice = self.choices[chunk.index]
            delta = choice.take(chunk)
            if choice.finish_reason is not None:
                self.generation.stop(chunk.index)
            yield chunk.index, delta

    def document(self, kind: str, choices: list[dict[str, Any]]) -> dict[str, Any]:
        """The whole answer."""
        return {**self._head, "object": kind, "choices": choices, "usage": self.usage()}

    def event(self, kind: str, choice: dict[str, Any]) -> dict[str, Any]:
        """One event of a stream."""
        found = {**self._head, "object": kind, "choices": [choice]}
        return found | {"usage": None} if self._usage_in_stream else found

    def last_events(self, kind: str) -> list[dict[str, Any]]:
        """The one with the usage, if it was asked for."""
        return [self.document(kind, [])] if self._usage_in_stream else []

    def usage(self) -> dict[str, Any]:
        """Tokens so far; each prompt counts once."""
        prompt = sum(len(ids) for ids in self.prompts)
        completion = sum(choice.tokens for choice in self.choices)
        cached = sum(choice.reused_tokens for choice in self.choices[:: self.n])
        return {
            "prompt_tokens": prompt,
            "completion_tokens": completion,
            "total_tokens": prompt + completion,
            "prompt_tokens_details": {"cached_tokens": cached},
        }
