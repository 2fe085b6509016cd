"""`POST /v1/completions`."""

from collections.abc import AsyncIterator, Sequence
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response

from cmx_jax.serving.api.answer import Answer
from cmx_jax.serving.api.context import ApiContext, Scores
from cmx_jax.serving.api.schemas import CompletionRequest
from cmx_jax.serving.http.streaming import EventStream, unless_gone
from cmx_jax.serving.scheduling.request import SamplingParams, TokenLogprob

router = APIRouter()
KIND = "text_completion"
MAX_TOKENS = 16  # OpenAI's, where nothing is asked for
Said = Sequence[TokenLogprob | None]
Echoed = tuple[str, Sequence[int], Said]  # a text, its tokens, and what is said of them


@router.post("/v1/completions")
async def completions(body: CompletionRequest, request: Request) -> Response:
    """Continues prompts, given as text or token ids."""
    answer, echoed = await unless_gone(request, _start(request.app.state.served, body))
    if body.stream:
        return EventStream(_events(answer, echoed, body), answer.generation)
    try:
        return JSONResponse(await unless_gone(request, _whole(answer, echoed, body)))
    finally:
        answer.generation.close()


class Part:
    """Text of a choice, and of its tokens what OpenAI's `logprobs` says of them.

    `offset` is where the next token's text begins, if every token is written by itself.
    """

    def __init__(self, served: ApiContext, logprobs: bool):
        self._served, self._logprobs, self._offset = served, logprobs, 0

    def document(self, text: str, tokens: Sequence[int], said: Said) -> dict[str, Any]:
        """A choice's text and log-probabilities."""
        return {"text": text, "logprobs": self._of(tokens, said) if self._logprobs else None}

    def _of(self, tokens: Sequence[int], said: Said) -> dict[str, list[Any]]:
        texts = [self._served.token_text(token) for token in tokens]
        offsets = []
        for text in texts:
            offsets.append(self._offset)
            self._offset += len(text)
        pairs = list(zip(tokens, said, strict=True))
        return {
            "tokens": texts,
            "token_logprobs": [None if of is None else of.logprob for of in said],
            "top_logprobs": [None if of is None else self._top(token, of) for token, of in pairs],
            "text_offset": offsets,
        }

    def _top(self, token: int, said: TokenLogprob) -> dict[str, float]:
        """The token taken and the likeliest ones; of several with the same text the likeliest counts."""
        found: dict[str, float] = {}
        for other, logprob in ((token, said.logprob), *said.top):
            text = self._served.token_text(other)
            found[text] = max(logprob, found.get(text, logprob))
        return found


async def _start(served: ApiContext, body: CompletionRequest) -> tuple[Answer, list[Echoed]]:
    """The answer, and what stands before each of its choices: nothing, or with `echo` the prompt."""
    served.check(body, len(body.prompt))
    prompts = await served.encode(body.prompt)
    params: list[SamplingParams] = []
    if body.echo and body.max_tokens == 0:
        SamplingParams(logprobs=body.logprobs)
    else:
        for ids in prompts:
            params += served.params(body, ids, body.max_tokens, MAX_TOKENS, body.logprobs)
    echoed: list[Echoed] = [("", [], [])] * len(prompts)
    if body.echo:
        scores: Scores = [[] for _ in prompts]
        if body.logprobs is not None:
            scores = await served.service.score(prompts, body.logprobs)
        texts = [x if isinstance(x, str) else served.text(x) for x in body.prompt]
        echoed = list(zip(texts, prompts, scores, strict=True))
    answer = await Answer.start(served, body, "cmpl", prompts, params)
    return answer, [of for of in echoed for _ in range(answer.n)]


async def _whole(answer: Answer, echoed: list[Echoed], body: CompletionRequest) -> dict[str, Any]:
    grown = [(text, [*tokens], [*said]) for text, tokens, said in echoed]
    async for index, delta in answer.deltas():
        text, tokens, said = grown[index]
        grown[index] = (text + delta.text, [*tokens, *delta.tokens], [*said, *delta.logprobs])
    parts = [Part(answer.served, body.logprobs is not None).document(*of) for of in grown]
    ends = [choice.finish_reason or "length" for choice in answer.choices]
    choices = [{"index": i, **part, "finish_reason": ends[i]} for i, part in enumerate(parts)]
    return answer.document(KIND, choices)


async def _events(
    answer: Answer, echoed: list[Echoed], body: CompletionRequest
) -> AsyncIterator[dict[str, Any]]:
    logprobs = body.logprobs is not None
    parts = [Part(answer.served, logprobs) for _ in answer.choices]

    def event(index: int, text: str, tokens: Sequence[int], said: Said, end: str | None) -> dict[str, Any]:
        part = parts[index].document(text, tokens, said)
        return answer.event(KIND, {"index": index, **part, "finish_reason": end})

    if body.echo:
        for index, of in enumerate(echoed):
            yield event(index, *of, None if index in answer.generation.running else "length")
    async for index, delta in answer.deltas():
        end = answer.choices[index].finish_reason
        if delta.text or end or (logprobs and delta.tokens):
            yield event(index, *delta, end)
    for last in answer.last_events(KIND):
        yield last
