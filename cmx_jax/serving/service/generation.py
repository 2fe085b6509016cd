"""Requests as an event loop sees them: chunks of tokens from each step, and the reason of their end."""

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field

from cmx_jax.serving.scheduling.request import Request, TokenLogprob


class Interrupted(Exception):
    """A request was ended by the service, not by its length or an end token."""


class StepFailed(Interrupted):
    """A request was in the engine when a step failed."""


@dataclass(frozen=True)
class Chunk:
    """Tokens that a step generated for one request.

    Attributes:
      index: Index of the request within its `Generation`.
      request: The request. Read only what no longer changes: its prompt, `arrived`, `cached_tokens`.
      tokens: New tokens; with MTP a step may give several.
      logprobs: Log-probability of each of them, where it was asked for.
      finish_reason: Finish reason of the request, in its last chunk; otherwise None.
      error: Error that ended the request: `Interrupted`, or the error of a worker; None if it did not fail.
      first: True if the chunk has the first token.
      gap_s: Seconds since the chunk before, or since arrival.
      age_s: Seconds since arrival.
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
    """Requests of one call: an asynchronous iterator of their `Chunk`s, as they come.

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
            if chunk.index not in self.running:  # it arrived while the request was being ended
                continue
            if chunk.error is not None:
                raise chunk.error
            if chunk.finish_reason is not None:
                self.running.discard(chunk.index)
            return chunk
        raise StopAsyncIteration

    def put(self, chunk: Chunk) -> None:
        """Adds the next chunk; the service calls this."""
        self._chunks.put_nowait(chunk)

    def stop(self, index: int) -> None:
        """Ends one request because its text is complete."""
        if index in self.running:
            self.running.discard(index)
            self._cancel(self, {index}, "stop")

    def close(self) -> None:
        """Ends all requests that still run, in any state; may be called twice."""
        running, self.running = self.running, set()
        if running:
            self._cancel(self, running, "abort")


Cancel = Callable[[Generation, set[int], str], None]
"""Ends the requests with these indices, with a finish reason."""


@dataclass(eq=False)
class ActiveRequest:
    """A request in the engine, with the state of its delivery.

    Attributes:
      generation: Generation that the request belongs to.
      index: Index of the request in it.
      request: The request.
      sent: Number of tokens that were delivered.
      ended: True if the service has ended the request with an error.
      delivered_at: Clock time in seconds of the last delivery, or of the arrival.
    """

    generation: Generation
    index: int
    request: Request
    sent: int = 0
    ended: bool = False
    delivered_at: float = field(init=False)

    def __post_init__(self) -> None:
        self.delivered_at = self.request.arrived

    def chunk(self, now: float) -> Chunk | None:
        """Returns the new tokens, or None if there are none and the request has not finished."""
        request, sent = self.request, self.sent
        tokens = request.tokens[sent:]
        if self.ended or (not tokens and request.finish_reason is None):
            return None
        self.sent = sent + len(tokens)
        reason, error = request.finish_reason, None
        if reason in ("abort", "error"):
            error = Interrupted(request.error or "the request was cancelled")
        return self._chunk(now, tokens, request.logprobs[sent:], reason, error)

    def end(self, now: float, error: Interrupted) -> Chunk:
        """Returns the last chunk of a request that the service ends."""
        self.ended = True
        return self._chunk(now, [], [], "error", error)

    def _chunk(
        self,
        now: float,
        tokens: list[int],
        logprobs: list[TokenLogprob],
        reason: str | None,
        error: Interrupted | None,
    ) -> Chunk:
        first, gap, age = self.sent == len(tokens) > 0, now - self.delivered_at, now - self.request.arrived
        self.delivered_at = now
        return Chunk(self.index, self.request, tokens, logprobs, reason, error, first, gap, age)
