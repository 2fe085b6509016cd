"""`POST /v1/chat/completions`."""

import asyncio
from collections.abc import AsyncIterator
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response

from cmx_jax.errors import CmxError
from cmx_jax.serving.api.answer import Answer
from cmx_jax.serving.api.choice import Delta
from cmx_jax.serving.api.context import ApiContext
from cmx_jax.serving.api.schemas import ChatRequest
from cmx_jax.serving.http.streaming import EventStream, unless_gone
from cmx_jax.serving.scheduling.request import TokenLogprob

router = APIRouter()
KIND, CHUNK = "chat.completion", "chat.completion.chunk"


@router.post("/v1/chat/completions")
async def chat_completions(body: ChatRequest, request: Request) -> Response:
    """Writes the assistant's next turn of a conversation."""
    answer = await unless_gone(request, _start(request.app.state.served, body))
    if body.stream:
        return EventStream(_events(answer, bool(body.logprobs)), answer.generation)
    try:
        return JSONResponse(await unless_gone(request, _whole(answer, bool(body.logprobs))))
    finally:
        answer.generation.close()


async def _start(served: ApiContext, body: ChatRequest) -> Answer:
    served.check(body, 1)
    if body.top_logprobs is not None and not body.logprobs:
        raise CmxError(f"top_logprobs is {body.top_logprobs} without logprobs: set logprobs to true")
    if None not in (body.max_tokens, body.max_completion_tokens):
        raise CmxError("both max_tokens and max_completion_tokens are given, expected one of them")
    if served.template is None:
        raise CmxError(f"{served.name} has no chat template: use /v1/completions")
    messages = [message.as_dict() for message in body.messages]
    prompt = await asyncio.to_thread(served.template.render, messages)
    [ids] = await served.encode([prompt], special=False)  # the template writes the special tokens
    asked = body.max_tokens if body.max_completion_tokens is None else body.max_completion_tokens
    logprobs = (body.top_logprobs or 0) if body.logprobs else None
    params = served.params(body, ids, asked, served.deployment.max_model_len, logprobs)
    return await Answer.start(served, body, "chatcmpl", [ids], params)


async def _whole(answer: Answer, logprobs: bool) -> dict[str, Any]:
    texts = [""] * len(answer.choices)
    said: list[list[dict[str, Any]]] = [[] for _ in texts]
    async for index, delta in answer.deltas():
        texts[index] += delta.text
        said[index] += _said(answer.served, delta) if logprobs else []
    choices = [
        {
            "index": index,
            "message": {"role": "assistant", "content": text},
            "logprobs": {"content": said[index]} if logprobs else None,
            "finish_reason": answer.choices[index].finish_reason,
        }
        for index, text in enumerate(texts)
    ]
    return answer.document(KIND, choices)


async def _events(answer: Answer, logprobs: bool) -> AsyncIterator[dict[str, Any]]:
    def event(index: int, delta: dict[str, str], said: Any, end: str | None) -> dict[str, Any]:
        choice = {"index": index, "delta": delta, "logprobs": said, "finish_reason": end}
        return answer.event(CHUNK, choice)

    for index in range(len(answer.choices)):
        yield event(index, {"role": "assistant", "content": ""}, None, None)
    async for index, delta in answer.deltas():
        if delta.text or (logprobs and delta.tokens):
            said = {"content": _said(answer.served, delta)} if logprobs else None
            yield event(index, {"content": delta.text}, said, None)
        if answer.choices[index].finish_reason is not None:
            yield event(index, {}, None, answer.choices[index].finish_reason)
    for last in answer.last_events(CHUNK):
        yield last


def _said(served: ApiContext, delta: Delta) -> list[dict[str, Any]]:
    """What OpenAI's `logprobs` says of each token."""

    def entry(token: int, logprob: float) -> dict[str, Any]:
        text = served.token_text(token)
        return {"token": text, "logprob": logprob, "bytes": list(text.encode())}

    def both(token: int, said: TokenLogprob) -> dict[str, Any]:
        return entry(token, said.logprob) | {"top_logprobs": [entry(*of) for of in said.top]}

    return [both(*of) for of in zip(delta.tokens, delta.logprobs, strict=True)]
