"""Server-sent events, and requests whose client disconnects."""

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Mapping
from typing import TypeVar

from starlette.requests import Request
from starlette.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from cmx_jax.errors import CmxError
from cmx_jax.serving.http import error_responses
from cmx_jax.serving.service.generation import Generation, Interrupted

T = TypeVar("T")


class GenerationStream(StreamingResponse):
    """An answer in parts.

    If the client disconnects, even before the first part, the generation is cancelled.
    """

    def __init__(self, parts: AsyncIterator[bytes], generation: Generation, media_type: str):
        super().__init__(parts, media_type=media_type)
        self._generation = generation

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._generation.close()


class EventStream(GenerationStream):
    """JSON documents as server-sent events."""

    def __init__(self, documents: AsyncIterator[Mapping[str, object]], generation: Generation):
        super().__init__(_events(documents), generation, "text/event-stream")
        self.headers["Cache-Control"] = "no-cache"


async def _events(documents: AsyncIterator[Mapping[str, object]]) -> AsyncIterator[bytes]:
    """Yields the documents, an error if one ended them, and OpenAI's last event."""
    try:
        async for document in documents:
            yield _event(document)
    except (Interrupted, CmxError) as error:
        yield _event(error_responses.body(error_responses.answer(error).status_code, str(error)))
    yield b"data: [DONE]\n\n"


def _event(document: Mapping[str, object]) -> bytes:
    return b"data: " + json.dumps(document, ensure_ascii=False).encode() + b"\n\n"


async def unless_gone(request: Request, answer: Awaitable[T]) -> T:
    """Returns the answer, unless the client disconnects; then the answer is cancelled.

    Args:
      request: Request whose body was read.
      answer: Answer to wait for.

    Raises:
      Gone: The client disconnected.
    """

    async def disconnect() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    result, disconnected = asyncio.ensure_future(answer), asyncio.ensure_future(disconnect())
    try:
        await asyncio.wait((result, disconnected), return_when=asyncio.FIRST_COMPLETED)
        if not result.done():
            raise error_responses.Gone
        return result.result()
    finally:
        for task in (result, disconnected):
            task.cancel()
        await asyncio.gather(result, disconnected, return_exceptions=True)
