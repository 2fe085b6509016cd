"""A growing answer: the common part of completions and chat completions."""

import time
import uuid
from collections.abc import AsyncIterator, Sequence
from typing import TypedDict

from cmx_jax.serving.api.choice import Choice, Delta
from cmx_jax.serving.api.context import ApiContext
from cmx_jax.serving.api.schemas import Document, Generate
from cmx_jax.serving.scheduling.request import SamplingParams
from cmx_jax.serving.service.generation import Generation


class PromptTokensDetails(TypedDict):
    """Number of prompt tokens that came out of the caching pool."""

    cached_tokens: int


class Usage(TypedDict):
    """Number of tokens of an answer so far; each prompt counts once."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails


class Answer:
    """The choices of one API call, `n` for each prompt.

    Attributes:
      context: Served model.
      prompts: Token ids of each prompt.
      n: Number of choices per prompt.
      choices: Every choice, in OpenAI's order.
      generation: Generation that yields the tokens of the choices.
    """

    def __init__(
        self,
        context: ApiContext,
        body: Generate,
        kind: str,
        prompts: Sequence[list[int]],
        generation: Generation,
    ):
        self.context, self.prompts, self.generation = context, prompts, generation
        self.n = body.n or 1
        self.choices = [Choice(context.tokenizer, body.stop) for _ in range(len(prompts) * self.n)]
        self._head = {
            "id": f"{kind}-{uuid.uuid4().hex}",
            "created": int(time.time()),
            "model": context.name,
        }
        options = body.stream_options
        self._usage_in_stream = options is not None and bool(options.include_usage)
        self._usage_in_events = options is not None and bool(options.continuous_usage_stats)

    @classmethod
    async def start(
        cls,
        context: ApiContext,
        body: Generate,
        kind: str,
        prompts: Sequence[list[int]],
        params: Sequence[SamplingParams],
    ) -> "Answer":
        """Submits all choices.

        Args:
          context: Served model.
          body: Body of the API call.
          kind: Prefix of the answer's id.
          prompts: Token ids of each prompt.
          params: Sampling parameters of each choice, in order; without any, the prompts are the whole answer.

        Raises:
          CmxError: A request cannot be served, as in `Frontend.generate`.
        """
        n = body.n or 1
        requests = [(prompts[i // n], choice) for i, choice in enumerate(params)]
        salt = body.cache_salt or ""
        generation = await context.service.generate(requests, priority=body.priority or 0, namespace=salt)
        return cls(context, body, kind, prompts, generation)

    async def deltas(self) -> AsyncIterator[tuple[int, Delta]]:
        """Yields the index of a choice and its new part, in the order of generation.

        Raises:
          Interrupted: The service ended one of the requests.
        """
        async for chunk in self.generation:
            choice = self.choices[chunk.index]
            delta = choice.take(chunk)
            if choice.finish_reason is not None:
                self.generation.stop(chunk.index)
            yield chunk.index, delta

    def document(self, kind: str, choices: list[Document]) -> Document:
        """Makes the document of the whole answer."""
        return {**self._head, "object": kind, "choices": choices, "usage": self.usage()}

    def event(self, kind: str, choice: Document) -> Document:
        """Makes one event of a stream."""
        event = {**self._head, "object": kind, "choices": [choice]}
        if self._usage_in_events:
            return event | {"usage": self.usage()}
        return event | {"usage": None} if self._usage_in_stream else event

    def last_events(self, kind: str) -> list[Document]:
        """Makes the last event of a stream, which has the usage, if it was asked for."""
        return [self.document(kind, [])] if self._usage_in_stream else []

    def usage(self) -> Usage:
        """Counts the tokens so far."""
        prompt = sum(len(ids) for ids in self.prompts)
        completion = sum(choice.tokens for choice in self.choices)
        cached = sum(choice.reused_tokens for choice in self.choices[:: self.n])
        return {
            "prompt_tokens": prompt,
            "completion_tokens": completion,
            "total_tokens": prompt + completion,
            "prompt_tokens_details": {"cached_tokens": cached},
        }
