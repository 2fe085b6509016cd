"""A worker as others ask it."""

import json
from collections.abc import AsyncGenerator, Sequence
from typing import Any

import httpx
from pydantic import BaseModel, ValidationError

from cmx_jax.errors import CmxError
from cmx_jax.serving.kv import TransferError
from cmx_jax.serving.roles.messages import (
    DecodeLine,
    DecodeRequest,
    PrefillAnswer,
    PrefillRequest,
    ScoreRequest,
    WorkerStatus,
    heard,
)
from cmx_jax.serving.scheduling.request import Overloaded, TokenLogprob
from cmx_jax.serving.service.frontend import Unavailable

CONNECT_S = 2.0
IDLE_S = 2.0  # of a connection, less than the 5 after which the other end closes it


class PeerError(Unavailable):
    """A worker cannot be reached, or failed; another one may serve."""


class Refused(PeerError):
    """A worker takes no request now, or is gone; nothing was lost."""


class Peer:
    """One worker. Answers are waited for without limit, as a prompt may wait, and compile; whether a worker
    still does anything its status says.

    Attributes:
      url: where it listens.
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
                f"{url!r} is no address of a worker ({error}), expected http://HOST:PORT"
            ) from None

    async def close(self) -> None:
        """Closes the connections."""
        await self._client.aclose()

    async def status(self, timeout_s: float = 2.0) -> WorkerStatus:
        """Who it is, and how much it has to do.

        Raises:
          PeerError: it does not say so in time, or is no worker.
        """
        answer = await self._answer("GET", "/internal/status", timeout=timeout_s)
        return _parsed(WorkerStatus, answer.content, self.url)

    async def prefill(self, body: PrefillRequest) -> PrefillAnswer:
        """Runs a prompt.

        Raises:
          Overloaded: its queue is full.
          PeerError: it cannot be reached, or failed.
          CmxError: the request cannot be served.
        """
        answer = await self._answer("POST", "/internal/prefill", body)
        return _parsed(PrefillAnswer, answer.content, self.url)

    async def decode(self, body: DecodeRequest) -> AsyncGenerator[DecodeLine, None]:
        """Continues a prompt; yields what each step gives. Whoever stops listening ends the request there.

        Raises:
          PeerError: it cannot be reached, or failed, or its answer ends without a reason.
          TransferError: the pages did not come to it.
          CmxError: the request cannot be served.
        """
        ended = False
        try:
            async with self._client.stream("POST", "/internal/decode", **_sent(body)) as answer:
                if answer.status_code != 200:
                    raise _refused(self.url, answer.status_code, await answer.aread())
                async for text in answer.aiter_lines():
                    line = _parsed(DecodeLine, text, self.url)
                    if line.error is not None:
                        raise PeerError(f"{self.url}: {line.error}")
                    ended = line.finish_reason is not None
                    yield line
        except httpx.HTTPError as error:
            if not ended:
                raise _unreachable(self.url, error) from None
        if not ended:
            raise PeerError(f"{self.url} ended its answer before the text")

    async def kv(self, transfer_id: int, what: str) -> bool:
        """`renew`, `acknowledge` or `withdraw` pages that it keeps; False: it has them no more.

        Raises:
          PeerError: it cannot be reached.
        """
        answer = await self._answer("POST", f"/internal/kv/{transfer_id}/{what}", timeout=10.0)
        return bool(answer.json()["done"])

    async def timeline(self) -> list[dict[str, Any]]:
        """Its `Timeline.events`.

        Raises:
          PeerError: it cannot be reached.
        """
        events: list[dict[str, Any]] = (await self._answer("GET", "/internal/trace", timeout=10.0)).json()
        return events

    async def score(self, prompts: Sequence[Sequence[int]], top: int) -> list[list[TokenLogprob | None]]:
        """See `Service.score`.

        Raises:
          PeerError: it cannot be reached, or failed.
          CmxError: a prompt exceeds the model's context.
        """
        body = ScoreRequest(prompts=[list(prompt) for prompt in prompts], top=top)
        rows = (await self._answer("POST", "/internal/score", body)).json()
        return [[None, *heard(row[1:])] for row in rows]

    async def _answer(
        self, method: str, path: str, body: BaseModel | None = None, timeout: float | None = None
    ) -> httpx.Response:
        more: dict[str, Any] = {} if body is None else _sent(body)
        if timeout is not None:
            more["timeout"] = timeout
        try:
            answer = await self._client.request(method, path, **more)
        except httpx.HTTPError as error:
            raise _unreachable(self.url, error) from None
        if answer.status_code != 200:
            raise _refused(self.url, answer.status_code, answer.content, answer.headers.get("retry-after"))
        return answer


def _sent(body: BaseModel) -> dict[str, Any]:
    return {"content": body.model_dump_json(), "headers": {"Content-Type": "application/json"}}


def _parsed(kind: Any, text: str | bytes, url: str) -> Any:
    try:
        return kind.model_validate_json(text)
    except ValidationError as error:
        raise PeerError(f"{url} does not answer as a worker does ({error.error_count()} mistakes)") from None


def _unreachable(url: str, error: httpx.HTTPError) -> PeerError:
    kind = Refused if isinstance(error, httpx.ConnectError | httpx.ConnectTimeout) else PeerError
    return kind(f"{url} cannot be reached ({str(error) or type(error).__name__})")


def _refused(url: str, status: int, content: bytes, retry_after: str | None = None) -> CmxError:
    """What an answer that is none means: 400 is the request's fault, 502 that of the pages' way, anything
    else the worker's."""
    try:
        message = str(json.loads(content)["error"]["message"])
    except (ValueError, KeyError, TypeError):
        message = f"status {status}"
    if status == 429:
        return Overloaded(message, float(retry_after or 1))
    if status in (400, 413):
        return CmxError(message)
    kind = {502: TransferError, 503: Refused}.get(status, PeerError)
    return kind(f"{url}: {message}")
