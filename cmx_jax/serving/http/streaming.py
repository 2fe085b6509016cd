"""Server-sent events, and clients that leave."""

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable
from typing import Any, TypeVar

from starlette.requests import Request
from starlette.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from cmx_jax.errors import CmxError
from cmx_jax.serving.http import errors
from cmx_jax.serving.service.generation import Generation, Interrupted

T = TypeVar("T")


class Stream(StreamingResponse):
    """An answer in parts; a client that leaves, be it before the first one, ends the generation behind it."""

    def __init__(self, parts: AsyncIterator[bytes], generation: Generation, media_type: str):
        super().__init__(parts, media_type=media_type)
        self._generation = generation

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._generation.close()


class EventStream(Stream):
    """Documents as events."""

    def __init__(self, documents: AsyncIterator[dict[str, Any]], generation: Generation):
        super().__init__(_events(documents), generation, "text/event-stream")
        self.headers["Cache-Control"] = "no-cache"


async def _events(documents: AsyncIterator[dict[str, Any]]) -> AsyncIterator[bytes]:
    """The documents, or the error that ended them, and OpenAI's last event."""
    try:
        async for document in documents:
            yield _event(document)
    except (Interrupted, CmxError) as error:
        yield _event(errors.body(errors.answer(error).status_code, str(error)))
    yield b"data: [DONE]\n\n"


def _event(document: dict[str, Any]) -> bytes:
    return b"data: " + json.dumps(document, ensure_ascii=False).encode() + b"\n\n"


async def unless_gone(request: Request, answer: Awaitable[T]) -> T:
    """The answer, or `errors.Gone` as soon as the client leaves; the answer is cancelled then.

    Args:
      request: whose body was read.
      answer: what it asks for.
    """

    async def gone() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    wanted, left = asyncio.ensure_future(answer), asyncio.ensure_future(gone())
    try:
        await asyncio.wait((wanted, left), return_when=asyncio.FIRST_COMPLETED)
        if not wanted.done():
            raise errors.Gone
        return wanted.result()
    finally:
        for task in (wanted, left):
            task.cancel()
        await asyncio.gather(wanted, left, return_exceptions=True)
