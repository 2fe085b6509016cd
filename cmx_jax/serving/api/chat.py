"""`POST /v1/chat/completions`."""

import asyncio
from collections.abc import AsyncIterator
from typing import TypedDict

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response

from cmx_jax.errors import CmxError
from cmx_jax.serving.api.answer import Answer
from cmx_jax.serving.api.choice import Delta
from cmx_jax.serving.api.context import ApiContext
from cmx_jax.serving.api.schemas import ChatRequest, Document
from cmx_jax.serving.http.streaming import EventStream, unless_gone
from cmx_jax.serving.scheduling.request import TokenLogprob

router = APIRouter()
KIND, CHUNK = "chat.completion", "chat.completion.chunk"


class TokenEntry(TypedDict):
    """A token's text, log-probability and UTF-8 bytes."""

    token: str
    logprob: float
    bytes: list[int]


class ChosenEntry(TokenEntry):
    """The entry of a generated token, with those of the most likely tokens at its position."""

    top_logprobs: list[TokenEntry]


class ChatLogprobs(TypedDict):
    """OpenAI's `logprobs` of a chat completion."""

    content: list[ChosenEntry]


@router.post("/v1/chat/completions")
async def chat_completions(body: ChatRequest, request: Request) -> Response:
    """Generates the assistant's next turn of a conversation."""
    answer = await unless_gone(request, _start(request.app.state.context, body))
    if body.stream:
        return EventStream(_events(answer, bool(body.logprobs)), answer.generation)
    try:
        return JSONResponse(await unless_gone(request, _whole(answer, bool(body.logprobs))))
    finally:
        answer.generation.close()


async def _start(context: ApiContext, body: ChatRequest) -> Answer:
    context.check(body, 1)
    if body.top_logprobs is not None and not body.logprobs:
        raise CmxError(f"top_logprobs is {body.top_logprobs} without logprobs: set logprobs to true")
    if None not in (body.max_tokens, body.max_completion_tokens):
        raise CmxError("both max_tokens and max_completion_tokens are given, expected one of them")
    if context.template is None:
        raise CmxError(f"{context.name} has no chat template: use /v1/completions")
    messages = [message.as_dict() for message in body.messages]
    prompt = await asyncio.to_thread(context.template.render, messages)
    [ids] = await context.encode([prompt], special=False)  # the template writes the special tokens
    max_tokens = body.max_tokens if body.max_completion_tokens is None else body.max_completion_tokens
    logprobs = (body.top_logprobs or 0) if body.logprobs else None
    params = context.params(body, ids, max_tokens, context.deployment.max_model_len, logprobs)
    return await Answer.start(context, body, "chatcmpl", [ids], params)


async def _whole(answer: Answer, logprobs: bool) -> Document:
    texts = [""] * len(answer.choices)
    entries: list[list[ChosenEntry]] = [[] for _ in texts]
    async for index, delta in answer.deltas():
        texts[index] += delta.text
        entries[index] += _entries(answer.context, delta) if logprobs else []
    choices = [
        {
            "index": index,
            "message": {"role": "assistant", "content": text},
            "logprobs": {"content": entries[index]} if logprobs else None,
            "finish_reason": answer.choices[index].finish_reason,
        }
        for index, text in enumerate(texts)
    ]
    return answer.document(KIND, choices)


async def _events(answer: Answer, logprobs: bool) -> AsyncIterator[Document]:
    def event(index: int, delta: dict[str, str], scores: ChatLogprobs | None, end: str | None) -> Document:
        choice = {"index": index, "delta": delta, "logprobs": scores, "finish_reason": end}
        return answer.event(CHUNK, choice)

    for index in range(len(answer.choices)):
        yield event(index, {"role": "assistant", "content": ""}, None, None)
    async for index, delta in answer.deltas():
        if delta.text or (logprobs and delta.tokens):
            scores: ChatLogprobs | None = {"content": _entries(answer.context, delta)} if logprobs else None
            yield event(index, {"content": delta.text}, scores, None)
        if answer.choices[index].finish_reason is not None:
            yield event(index, {}, None, answer.choices[index].finish_reason)
    for last in answer.last_events(CHUNK):
        yield last


def _entries(context: ApiContext, delta: Delta) -> list[ChosenEntry]:
    """Makes the entry of each new token."""

    def entry(token: int, logprob: float) -> TokenEntry:
        text = context.token_text(token)
        return {"token": text, "logprob": logprob, "bytes": list(context.token_bytes(token))}

    def chosen(token: int, scores: TokenLogprob) -> ChosenEntry:
        return {**entry(token, scores.logprob), "top_logprobs": [entry(*other) for other in scores.top]}

    return [chosen(*pair) for pair in zip(delta.tokens, delta.logprobs, strict=True)]
