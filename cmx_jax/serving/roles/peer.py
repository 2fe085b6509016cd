"""The client of one worker."""

import json
from collections.abc import AsyncGenerator, Sequence
from typing import Any, TypeVar

import httpx
from pydantic import BaseModel, ValidationError

from cmx_jax.errors import CmxError
from cmx_jax.serving.engine.timeline import TraceEvent
from cmx_jax.serving.kv import TransferError
from cmx_jax.serving.roles.messages import (
    DecodeLine,
    DecodeRequest,
    PrefillAnswer,
    PrefillRequest,
    ScoreRequest,
    WorkerStatus,
    logprobs_from_json,
)
from cmx_jax.serving.scheduling.request import Overloaded, TokenLogprob
from cmx_jax.serving.service.frontend import Unavailable

M = TypeVar("M", bound=BaseModel)
CONNECT_S = 2.0
IDLE_S = 2.0  # for which a connection is kept, less than the 5 s after which the worker closes it
JSON = {"Content-Type": "application/json"}


class PeerError(Unavailable):
    """A worker cannot be reached, or failed; another one may serve."""


class Refused(PeerError):
    """A worker takes no request now, or is gone; no work was lost."""


class Peer:
    """Client of one worker.

    Answers have no time limit, because a prompt may wait, and programs may be compiled for it. The worker's
    status tells whether it still makes progress.

    Attributes:
      url: URL of the worker.
    """

    def __init__(self, url: str, secret: str):
        self.url = url.rstrip("/")
        try:
            self._client = httpx.AsyncClient(
                base_url=self.url,
                headers={"Authorization": f"Bearer {secret}"},
                timeout=httpx.Timeout(None, connect=CONNECT_S),
                limits=httpx.Limits(
                    max_connections=None, max_keepalive_connections=32, keepalive_expiry=IDLE_S
                ),
                trust_env=False,
            )
        except httpx.InvalidURL as error:
            raise CmxError(
                f"{url!r} is not the address of a worker ({error}), expected http://HOST:PORT"
            ) from None

    async def close(self) -> None:
        """Closes the connections."""
        await self._client.aclose()

    async def status(self, timeout_s: float = 2.0) -> WorkerStatus:
        """Returns the worker's identity and load.

        Raises:
          PeerError: The peer does not answer in time, or is not a worker.
        """
        answer = await self._answer("GET", "/internal/status", timeout=timeout_s)
        return _parse(WorkerStatus, answer.content, self.url)

    async def prefill(self, body: PrefillRequest) -> PrefillAnswer:
        """Runs a prompt on the worker.

        Raises:
          Overloaded: The worker's queue is full.
          PeerError: The worker cannot be reached, or failed.
          CmxError: The request cannot be served.
        """
        answer = await self._answer("POST", "/internal/prefill", body)
        return _parse(PrefillAnswer, answer.content, self.url)

    async def decode(self, body: DecodeRequest) -> AsyncGenerator[DecodeLine, None]:
        """Continues a prompt and yields the tokens of each step. Closing the generator ends the request.

        Raises:
          PeerError: The worker cannot be reached, or failed, or its answer ends without a finish reason.
          TransferError: The worker could not fetch the pages.
          CmxError: The request cannot be served.
        """
        ended = False
        try:
            async with self._client.stream(
                "POST", "/internal/decode", content=body.model_dump_json(), headers=JSON
            ) as answer:
                if answer.status_code != 200:
                    raise _error_of(self.url, answer.status_code, await answer.aread())
                async for text in answer.aiter_lines():
                    line = _parse(DecodeLine, text, self.url)
                    if line.error is not None:
                        raise PeerError(f"{self.url}: {line.error}")
                    ended = line.finish_reason is not None
                    yield line
        except httpx.HTTPError as error:
            if not ended:
                raise _unreachable(self.url, error) from None
        if not ended:
            raise PeerError(f"{self.url} ended its answer before the text")

    async def kv(self, transfer_id: int, action: str) -> bool:
        """Renews, acknowledges or withdraws pages that the worker keeps.

        Args:
          transfer_id: Id of the pages' ticket.
          action: One of `renew`, `acknowledge` and `withdraw`.

        Returns:
          False if the worker no longer holds the pages.

        Raises:
          PeerError: The worker cannot be reached.
        """
        answer = await self._answer("POST", f"/internal/kv/{transfer_id}/{action}", timeout=10.0)
        return bool(answer.json()["done"])

    async def timeline(self) -> list[TraceEvent]:
        """Returns the `Timeline.events` of the worker.

        Raises:
          PeerError: The worker cannot be reached.
        """
        events: list[TraceEvent] = (await self._answer("GET", "/internal/trace", timeout=10.0)).json()
        return events

    async def score(self, prompts: Sequence[Sequence[int]], top: int) -> list[list[TokenLogprob | None]]:
        """Returns the log-probability of each token of prompts, as `Frontend.score` does.

        Raises:
          PeerError: The worker cannot be reached, or failed.
          CmxError: A prompt exceeds the model's context.
        """
        body = ScoreRequest(prompts=[list(prompt) for prompt in prompts], top=top)
        rows = (await self._answer("POST", "/internal/score", body)).json()
        return [[None, *logprobs_from_json(row[1:])] for row in rows]

    async def _answer(
        self, method: str, path: str, body: BaseModel | None = None, timeout: float | None = None
    ) -> httpx.Response:
        try:
            answer = await self._client.request(
                method,
                path,
                content=None if body is None else body.model_dump_json(),
                headers=None if body is None else JSON,
                timeout=httpx.USE_CLIENT_DEFAULT if timeout is None else timeout,
            )
        except httpx.HTTPError as error:
            raise _unreachable(self.url, error) from None
        if answer.status_code != 200:
            raise _error_of(self.url, answer.status_code, answer.content, answer.headers.get("retry-after"))
        return answer


def _parse(kind: type[M], text: str | bytes, url: str) -> M:
    try:
        return kind.model_validate_json(text)
    except ValidationError as error:
        raise PeerError(f"{url} does not answer as a worker does ({error.error_count()} mistakes)") from None


def _unreachable(url: str, error: httpx.HTTPError) -> PeerError:
    kind = Refused if isinstance(error, httpx.ConnectError | httpx.ConnectTimeout) else PeerError
    return kind(f"{url} cannot be reached ({str(error) or type(error).__name__})")


def _error_of(url: str, status: int, content: bytes, retry_after: str | None = None) -> CmxError:
    """Maps an HTTP error to an exception: 429 queue, 400/413 request, 502 KV transfer, otherwise worker."""
    try:
        message = str(json.loads(content)["error"]["message"])
    except (ValueError, KeyError, TypeError):
        message = f"status {status}"
    if status == 429:
        return Overloaded(message, float(retry_after or 1))
    if status in (400, 413):
        return CmxError(message)
    kind: Any = {502: TransferError, 503: Refused}.get(status, PeerError)
    error: CmxError = kind(f"{url}: {message}")
    return error
