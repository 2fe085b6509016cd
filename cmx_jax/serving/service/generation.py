"""Requests that an event loop waits for: what each step gave to them, and why they ended."""

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field

from cmx_jax.serving.scheduling.request import Request, TokenLogprob


class Interrupted(Exception):
    """A request was ended by the service, not by its length or an end token."""


class StepFailed(Interrupted):
    """It was in the engine when a step failed."""


@dataclass(frozen=True)
class Chunk:
    """What a step gave to one request.

    Attributes:
      index: of the request within its `Generation`.
      request: only what does not change any more may be read: its prompt, `arrived`, `cached_tokens`.
      tokens: new ones; with MTP a step gives several.
      logprobs: of each of them, where they were asked for.
      finish_reason: with the last chunk.
      error: why it ended, if that is its fault or the service's: `Interrupted`, or what a worker says.
      first: whether it has the first token.
      gap_s: seconds since the chunk before, or since arrival.
      age_s: seconds since arrival.
    """

    index: int
    request: Request
    tokens: list[int]
    logprobs: list[TokenLogprob]
    finish_reason: str | None
    error: Exception | None
    first: bool
    gap_s: float
    age_s: float


class Generation:
    """Requests that belong together: an asynchronous iterator of their `Chunk`s, as they come.

    It ends when all have finished, and raises `Interrupted` as soon as one of them was ended by the service.
    """

    def __init__(self, size: int, cancel: "Cancel"):
        self._cancel = cancel
        self._chunks: asyncio.Queue[Chunk] = asyncio.Queue()
        self.running = set(range(size))

    def __aiter__(self) -> "Generation":
        return self

    async def __anext__(self) -> Chunk:
        while self.running:
            chunk = await self._chunks.get()
            if chunk.index not in self.running:  # it came while the request was being ended
                continue
            if chunk.error is not None:
                raise chunk.error
            if chunk.finish_reason is not None:
                self.running.discard(chunk.index)
            return chunk
        raise StopAsyncIteration

    def put(self, chunk: Chunk) -> None:
        """Takes the next chunk (the service does so)."""
        self._chunks.put_nowait(chunk)

    def stop(self, index: int) -> None:
        """Ends one request because its text is complete."""
        if index in self.running:
            self.running.discard(index)
            self._cancel(self, {index}, "stop")

    def close(self) -> None:
        """Ends all that still run, at whatever stage they are; may be called twice."""
        left, self.running = self.running, set()
        if left:
            self._cancel(self, left, "abort")


Cancel = Callable[[Generation, set[int], str], None]  # some of its requests, for a reason


@dataclass(eq=False)
class ActiveRequest:
    """A request in the engine, and how much of it was handed over; `ended`: its client was told an error."""

    generation: Generation
    index: int
    request: Request
    sent: int = 0
    ended: bool = False
    at: float = field(init=False)

    def __post_init__(self) -> None:
        self.at = self.request.arrived

    def chunk(self, now: float) -> Chunk | None:
        """What is new, if anything is."""
        request, sent = self.request, self.sent
        tokens = request.tokens[sent:]
        if self.ended or (not tokens and request.finish_reason is None):
            return None
        self.sent = sent + len(tokens)
        reason, error = request.finish_reason, None
        if reason in ("abort", "error"):
            error = Interrupted(request.error or "the request was cancelled")
        return self._made(now, tokens, request.logprobs[sent:], reason, error)

    def end(self, now: float, error: Interrupted) -> Chunk:
        """The last chunk of a request that the service ends."""
        self.ended = True
        return self._made(now, [], [], "error", error)

    def _made(
        self,
        now: float,
        tokens: list[int],
        logprobs: list[TokenLogprob],
        reason: str | None,
        error: Interrupted | None,
    ) -> Chunk:
        first, gap, age = self.sent == len(tokens) > 0, now - self.at, now - self.request.arrived
        self.at = now
        return Chunk(self.index, self.request, tokens, logprobs, reason, error, first, gap, age)
