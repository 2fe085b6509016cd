"""`POST /v1/completions`."""

from collections.abc import AsyncIterator, Sequence
from typing import TypedDict

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response

from cmx_jax.serving.api.answer import Answer
from cmx_jax.serving.api.context import ApiContext, Scores
from cmx_jax.serving.api.schemas import CompletionRequest, Document
from cmx_jax.serving.http.streaming import EventStream, unless_gone
from cmx_jax.serving.scheduling.request import SamplingParams, TokenLogprob

router = APIRouter()
KIND = "text_completion"
MAX_TOKENS = 16  # OpenAI's default
TokenScores = Sequence[TokenLogprob | None]
Echoed = tuple[str, Sequence[int], TokenScores]  # text, its tokens, and their log-probabilities


class CompletionLogprobs(TypedDict):
    """OpenAI's `logprobs` of a completion; each list has an entry for each token.

    Attributes:
      tokens: Text of each token by itself.
      token_logprobs: Log-probability of each token, or None.
      top_logprobs: Log-probabilities of the token and of the most likely ones, by their text, or None.
      text_offset: Offset of each token's text in the choice's text.
    """

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


@router.post("/v1/completions")
async def completions(body: CompletionRequest, request: Request) -> Response:
    """Continues prompts, given as text or token ids."""
    answer, echoed = await unless_gone(request, _start(request.app.state.context, body))
    if body.stream:
        return EventStream(_events(answer, echoed, body), answer.generation)
    try:
        return JSONResponse(await unless_gone(request, _whole(answer, echoed, body)))
    finally:
        answer.generation.close()


class ChoicePart:
    """Converts a choice's text and tokens to OpenAI's form, part by part.

    A token's offset is the length of the text before it; parts of a character have the character's.
    """

    def __init__(self, context: ApiContext, logprobs: bool):
        self._context, self._logprobs = context, logprobs
        self._before = b""  # bytes of all tokens so far

    def document(self, text: str, tokens: Sequence[int], scores: TokenScores) -> Document:
        """Makes the fields of a choice for its next part."""
        return {"text": text, "logprobs": self._scores(tokens, scores) if self._logprobs else None}

    def _scores(self, tokens: Sequence[int], scores: TokenScores) -> CompletionLogprobs:
        texts = [self._context.token_text(token) for token in tokens]
        offsets = []
        for token in tokens:
            offsets.append(len(self._before.decode(errors="ignore")))
            written = self._context.token_bytes(token)
            if not self._before and not self._context.text([token]).startswith(" "):
                written = written.removeprefix(b" ")  # decoders of SentencePiece drop the first space
            self._before += written
        pairs = list(zip(tokens, scores, strict=True))
        return {
            "tokens": texts,
            "token_logprobs": [None if score is None else score.logprob for score in scores],
            "top_logprobs": [None if score is None else self._top(token, score) for token, score in pairs],
            "text_offset": offsets,
        }

    def _top(self, token: int, score: TokenLogprob) -> dict[str, float]:
        """Returns log-probabilities by text; of tokens with the same text, the most likely one counts."""
        by_text: dict[str, float] = {}
        for other, logprob in ((token, score.logprob), *score.top):
            text = self._context.token_text(other)
            by_text[text] = max(logprob, by_text.get(text, logprob))
        return by_text


async def _start(context: ApiContext, body: CompletionRequest) -> tuple[Answer, list[Echoed]]:
    """Submits the request. Returns the answer, and the text before each choice: with `echo` the prompt."""
    context.check(body, len(body.prompt))
    prompts = await context.encode(body.prompt)
    params: list[SamplingParams] = []
    if body.echo and body.max_tokens == 0:
        SamplingParams(logprobs=body.logprobs)
    else:
        for ids in prompts:
            params += context.params(body, ids, body.max_tokens, MAX_TOKENS, body.logprobs)
    echoed: list[Echoed] = [("", [], [])] * len(prompts)
    if body.echo:
        scores: Scores = [[] for _ in prompts]
        if body.logprobs is not None:
            scores = await context.service.score(prompts, body.logprobs)
        texts = [x if isinstance(x, str) else context.text(x) for x in body.prompt]
        echoed = list(zip(texts, prompts, scores, strict=True))
    answer = await Answer.start(context, body, "cmpl", prompts, params)
    return answer, [prefix for prefix in echoed for _ in range(answer.n)]


async def _whole(answer: Answer, echoed: list[Echoed], body: CompletionRequest) -> Document:
    grown = [(text, [*tokens], [*scores]) for text, tokens, scores in echoed]
    async for index, delta in answer.deltas():
        text, tokens, scores = grown[index]
        grown[index] = (text + delta.text, [*tokens, *delta.tokens], [*scores, *delta.logprobs])
    parts = [ChoicePart(answer.context, body.logprobs is not None).document(*choice) for choice in grown]
    ends = [choice.finish_reason or "length" for choice in answer.choices]
    choices = [{"index": i, **part, "finish_reason": ends[i]} for i, part in enumerate(parts)]
    return answer.document(KIND, choices)


async def _events(answer: Answer, echoed: list[Echoed], body: CompletionRequest) -> AsyncIterator[Document]:
    logprobs = body.logprobs is not None
    parts = [ChoicePart(answer.context, logprobs) for _ in answer.choices]

    def event(index: int, text: str, tokens: Sequence[int], scores: TokenScores, end: str | None) -> Document:
        part = parts[index].document(text, tokens, scores)
        return answer.event(KIND, {"index": index, **part, "finish_reason": end})

    if body.echo:
        for index, prefix in enumerate(echoed):
            yield event(index, *prefix, None if index in answer.generation.running else "length")
    async for index, delta in answer.deltas():
        end = answer.choices[index].finish_reason
        if delta.text or end or (logprobs and delta.tokens):
            yield event(index, *delta, end)
    for last in answer.last_events(KIND):
        yield last
