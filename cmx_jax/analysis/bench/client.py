"""One request, timed: a stream of events to when its text came."""

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from time import perf_counter
from typing import Any

import httpx
import numpy as np

from cmx_jax.analysis.bench.prompts import Ask
from cmx_jax.analysis.bench.sse import EventParser
from cmx_jax.analysis.bench.target import Target, message, reason


class Failure(Exception):
    """A request that was not answered to its end; the text is `REASON: what was said`."""


@dataclass
class Outcome:
    """What became of a request. Times are seconds of `time.perf_counter`.

    Attributes:
      start: when it was sent.
      chunks: when text came, once for each event that has some; of an answer without text its end.
      end: when the answer was known to have ended, or failed.
      error: empty, or why it failed; the rest is what came until then.
    """

    start: float
    chunks: list[float] = field(default_factory=list)
    end: float = 0.0
    text: str = ""
    prompt_tokens: int = 0
    output_tokens: int = 0
    cached_tokens: int = 0
    error: str = ""

    @property
    def ttft(self) -> float:
        """Time to first token."""
        return self.chunks[0] - self.start

    @property
    def e2el(self) -> float:
        """End-to-end latency."""
        return self.end - self.start

    @property
    def tpot(self) -> float:
        """Mean time of each token behind the first; 0 if there is none."""
        later = self.output_tokens - 1
        return (self.end - self.chunks[0]) / later if later > 0 else 0.0

    @property
    def itls(self) -> list[float]:
        """Gaps between chunks; one chunk may hold several tokens."""
        return np.diff(self.chunks).tolist()


class Client:
    """Streams requests to a server; an async context.

    Args:
      target: the server.
      temperature: of sampling.
      ignore_eos: whether answers go on behind an end token; not of every server.
      timeout_s: seconds that a request may take.
    """

    def __init__(self, target: Target, temperature: float, ignore_eos: bool, timeout_s: float):
        self._target, self._timeout_s = target, timeout_s
        self._common: dict[str, Any] = {"model": target.model, "temperature": temperature, "stream": True}
        self._common["stream_options"] = {"include_usage": True}
        if ignore_eos:
            self._common["ignore_eos"] = True
        self._tls = httpx.create_ssl_context(trust_env=False)
        self._idle: list[httpx.AsyncClient] = []

    async def __aenter__(self) -> "Client":
        return self

    async def __aexit__(self, *_: object) -> None:
        for http in self._idle:
            await http.aclose()

    @asynccontextmanager
    async def _connection(self) -> AsyncIterator[httpx.AsyncClient]:
        """One for each request that runs; httpx's pool would look at all of them for every request."""
        if self._idle:
            http = self._idle.pop()
        else:
            headers = self._target.headers
            http = httpx.AsyncClient(headers=headers, timeout=None, verify=self._tls, trust_env=False)
        try:
            yield http
        finally:
            self._idle.append(http)

    async def stream(self, ask: Ask) -> Outcome:
        """Sends a request and reads its answer; a failure is an outcome, too."""
        body = self._common | self._prompt(ask)
        found = Outcome(perf_counter())
        try:
            async with asyncio.timeout(self._timeout_s):
                await self._read(body, found)
        except TimeoutError:
            found.error = f"timeout: not finished within {self._timeout_s:g} s"
        except Failure as error:
            found.error = str(error)
        except httpx.ConnectError as error:
            found.error = f"no connection: {reason(error)}"
        except httpx.HTTPError as error:
            found.error = f"connection lost: {reason(error)}"
        if found.error:
            found.end = perf_counter()
        return found

    def _prompt(self, ask: Ask) -> dict[str, Any]:
        if self._target.chat:
            turn = {"role": "user", "content": ask.text}
            return {"messages": [turn], "max_completion_tokens": ask.max_tokens}
        return {"prompt": ask.prompt, "max_tokens": ask.max_tokens}

    async def _read(self, body: dict[str, Any], found: Outcome) -> None:
        url, events, done = f"{self._target.base_url}{self._target.endpoint}", EventParser(), False
        async with self._connection() as http, http.stream("POST", url, json=body) as answer:
            if answer.status_code != 200:
                raise Failure(f"HTTP {answer.status_code}: {message(await answer.aread())}")
            async for part in answer.aiter_bytes():
                now = perf_counter()
                for data in events.feed(part):
                    done = done or data == "[DONE]"
                    if not done:
                        _take(found, data, now)
        if not done:
            raise Failure("connection lost: the stream ended before data: [DONE]")
        if not (found.chunks and found.output_tokens):
            raise Failure("incomplete answer: no token came, or no usage (stream_options.include_usage)")


def _take(found: Outcome, data: str, now: float) -> None:
    """Notes one event.

    Raises:
      Failure: it is an error, or none of OpenAI's.
    """
    try:
        event = json.loads(data)
        if event.get("error"):
            raise Failure(f"error in the stream: {message(data.encode())}")
        for choice in event.get("choices") or ():
            text = choice.get("text") or (choice.get("delta") or {}).get("content") or ""
            ended = bool(choice.get("finish_reason"))
            if text or (ended and not found.chunks):
                found.chunks.append(now)
            if text or ended:
                found.end = now
            found.text += text
        if usage := event.get("usage"):
            details = usage.get("prompt_tokens_details") or {}
            found.prompt_tokens = int(usage["prompt_tokens"])
            found.output_tokens = int(usage["completion_tokens"])
            found.cached_tokens = int(details.get("cached_tokens") or 0)
    except (ValueError, KeyError, TypeError, AttributeError):
        raise Failure(f"not understood: {data[:80]!r}") from None
