"""One timed request: reads a stream of server-sent events and notes when text arrives."""

import asyncio
import codecs
import io
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from time import perf_counter

import httpx
import numpy as np

from cmx_jax.analysis.bench.prompts import BenchRequest
from cmx_jax.analysis.bench.target import Target, message, reason


class RequestFailed(Exception):
    """A request without a complete answer; the text is `REASON: DETAILS`."""


@dataclass
class RequestOutcome:
    """Times and size of an answer. Times are seconds of `time.perf_counter`.

    Attributes:
      start: Time of sending.
      chunks: Times of the events with text; the time of the end if the answer has no text.
      end: Time of the last event of the answer, or of the failure.
      text: Text of the answer.
      prompt_tokens: Number of prompt tokens.
      output_tokens: Number of generated tokens.
      cached_tokens: Number of prompt tokens that came from a prefix cache.
      error: Empty, or the reason of the failure; the other attributes then hold what came before it.
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
        """Time to first token, in seconds."""
        return self.chunks[0] - self.start

    @property
    def e2el(self) -> float:
        """End-to-end latency, in seconds."""
        return self.end - self.start

    @property
    def tpot(self) -> float:
        """Mean seconds per token after the first; 0 if there is none."""
        later = self.output_tokens - 1
        return (self.end - self.chunks[0]) / later if later > 0 else 0.0

    @property
    def itls(self) -> list[float]:
        """Gaps between chunks, in seconds; one chunk may hold several tokens."""
        return np.diff(self.chunks).tolist()


class EventParser:
    """Splits a stream of server-sent events, cut at any bytes, into the data of its events.

    As in the HTML standard, section 9.2.6: lines end with LF, CR or CRLF, an empty line ends an event, and
    its `data` lines are joined. Comments and other fields are ignored.
    """

    def __init__(self) -> None:
        utf8 = codecs.getincrementaldecoder("utf-8-sig")("replace")
        self._text = io.IncrementalNewlineDecoder(utf8, translate=True)
        self._line, self._data = "", list[str]()

    def feed(self, part: bytes) -> list[str]:
        """Takes the next part of the stream; returns the data of each event that ends in it."""
        *lines, self._line = (self._line + self._text.decode(part)).split("\n")
        events = []
        for line in lines:
            name, _, value = line.partition(":")
            if name == "data":
                self._data.append(value.removeprefix(" "))
            elif not line and self._data:
                events.append("\n".join(self._data))
                self._data = []
        return events


class Client:
    """Streams requests to a server; an async context.

    Args:
      target: The server.
      temperature: Sampling temperature.
      ignore_eos: Flag; answers continue after an end token. Not every server supports it.
      timeout_s: Time limit of a request, in seconds.
    """

    def __init__(self, target: Target, temperature: float, ignore_eos: bool, timeout_s: float):
        self._target, self._timeout_s = target, timeout_s
        self._common: dict[str, object] = {"model": target.model, "temperature": temperature, "stream": True}
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
        """Lends a connection to one request; httpx's pool would look at all connections for every request."""
        if self._idle:
            http = self._idle.pop()
        else:
            headers = self._target.headers
            http = httpx.AsyncClient(headers=headers, timeout=None, verify=self._tls, trust_env=False)
        try:
            yield http
        finally:
            self._idle.append(http)

    async def stream(self, request: BenchRequest) -> RequestOutcome:
        """Sends a request and reads its answer; a failure is an outcome, too."""
        body = self._common | self._prompt(request)
        outcome = RequestOutcome(perf_counter())
        try:
            async with asyncio.timeout(self._timeout_s):
                await self._read(body, outcome)
        except TimeoutError:
            outcome.error = f"timeout: not finished within {self._timeout_s:g} s"
        except RequestFailed as error:
            outcome.error = str(error)
        except httpx.ConnectError as error:
            outcome.error = f"no connection: {reason(error)}"
        except httpx.HTTPError as error:
            outcome.error = f"connection lost: {reason(error)}"
        if outcome.error:
            outcome.end = perf_counter()
        return outcome

    def _prompt(self, request: BenchRequest) -> dict[str, object]:
        if self._target.chat:
            turn = {"role": "user", "content": request.text}
            return {"messages": [turn], "max_completion_tokens": request.max_tokens}
        return {"prompt": request.prompt, "max_tokens": request.max_tokens}

    async def _read(self, body: dict[str, object], outcome: RequestOutcome) -> None:
        url, events, done = f"{self._target.base_url}{self._target.endpoint}", EventParser(), False
        async with self._connection() as http, http.stream("POST", url, json=body) as answer:
            if answer.status_code != 200:
                raise RequestFailed(f"HTTP {answer.status_code}: {message(await answer.aread())}")
            async for part in answer.aiter_bytes():
                now = perf_counter()
                for data in events.feed(part):
                    done = done or data == "[DONE]"
                    if not done:
                        _take(outcome, data, now)
        if not done:
            raise RequestFailed("connection lost: the stream ended before data: [DONE]")
        if not (outcome.chunks and outcome.output_tokens):
            raise RequestFailed(
                "incomplete answer: no token came, or no usage (stream_options.include_usage)"
            )


def _take(outcome: RequestOutcome, data: str, now: float) -> None:
    """Adds the data of an event to an outcome.

    Raises:
      RequestFailed: The event is an error, or not in OpenAI's format.
    """
    try:
        event = json.loads(data)
        if event.get("error"):
            raise RequestFailed(f"error in the stream: {message(data.encode())}")
        for choice in event.get("choices") or ():
            text = choice.get("text") or (choice.get("delta") or {}).get("content") or ""
            ended = bool(choice.get("finish_reason"))
            if text or (ended and not outcome.chunks):
                outcome.chunks.append(now)
            if text or ended:
                outcome.end = now
            outcome.text += text
        if usage := event.get("usage"):
            details = usage.get("prompt_tokens_details") or {}
            outcome.prompt_tokens = int(usage["prompt_tokens"])
            outcome.output_tokens = int(usage["completion_tokens"])
            outcome.cached_tokens = int(details.get("cached_tokens") or 0)
    except (ValueError, KeyError, TypeError, AttributeError):
        raise RequestFailed(f"not understood: {data[:80]!r}") from None
