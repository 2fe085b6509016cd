"""One growing choice of an answer: tokens in, text and log-probabilities out."""

from collections.abc import Sequence
from typing import NamedTuple

from tokenizers import Tokenizer

from cmx_jax.serving.api.detokenizer import Detokenizer, StopStrings
from cmx_jax.serving.scheduling.request import TokenLogprob
from cmx_jax.serving.service.generation import Chunk


class Delta(NamedTuple):
    """New part of a choice.

    Attributes:
      text: Text that is complete now.
      tokens: Tokens of the choice.
      logprobs: Log-probabilities of the tokens, if they were asked for.
    """

    text: str
    tokens: list[int]
    logprobs: list[TokenLogprob]


class Choice:
    """The text of one request.

    An end token belongs to the tokens and their log-probabilities, not to the text (as in vLLM).

    Attributes:
      finish_reason: Reason why the choice ended, or None while it grows.
      tokens: Number of tokens so far.
      reused_tokens: Number of prompt tokens that came out of the caching pool.
    """

    def __init__(self, tokenizer: Tokenizer | None, stops: Sequence[str]):
        self._text, self._stops = Detokenizer(tokenizer), StopStrings(stops)
        self.finish_reason: str | None = None
        self.tokens = self.reused_tokens = 0

    def take(self, chunk: Chunk) -> Delta:
        """Adds a chunk, up to the token that completes a stop string. Returns the new part of the choice."""
        self.reused_tokens = chunk.request.cached_tokens
        text, taken = "", 0
        ended = len(chunk.tokens) - (chunk.finish_reason == "stop")  # the last one is an end token
        for token in chunk.tokens[:ended]:
            text += self._stops.add(self._text.add(token))
            taken += 1
            if self._stops.found:
                self.finish_reason = "stop"
                break
        else:
            taken, self.finish_reason = len(chunk.tokens), chunk.finish_reason
            if self.finish_reason is not None:
                text += self._stops.add(self._text.end()) + self._stops.end()
                self.finish_reason = "stop" if self._stops.found else self.finish_reason
        self.tokens += taken
        return Delta(text, chunk.tokens[:taken], chunk.logprobs[:taken])
