"""The model that an app serves: converts prompts to tokens and request bodies to sampling parameters."""

import asyncio
import secrets
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

from tokenizers import Tokenizer

from cmx_jax.errors import CmxError
from cmx_jax.serving.api.schemas import Generate
from cmx_jax.serving.api.template import ChatTemplate
from cmx_jax.serving.api.token_bytes import TokenBytes
from cmx_jax.serving.deploy.deployment import ModelInfo
from cmx_jax.serving.http.error_responses import NotFound
from cmx_jax.serving.scheduling.request import SamplingParams, TokenLogprob
from cmx_jax.serving.service.frontend import Frontend

Scores = list[list[TokenLogprob | None]]


@dataclass(frozen=True, kw_only=True)
class Limits:
    """Limits of one API call.

    Attributes:
      max_body_bytes: Largest size of the body in bytes.
      max_choices: Largest number of choices, which is prompts times `n`.

    Raises:
      CmxError: A limit is less than 1.
    """

    max_body_bytes: int = 8 << 20
    max_choices: int = 256

    def __post_init__(self) -> None:
        for name in ("max_body_bytes", "max_choices"):
            if getattr(self, name) < 1:
                raise CmxError(f"{name} is {getattr(self, name)}, expected at least 1")


@dataclass(frozen=True, kw_only=True)
class ApiContext:
    """The model that the API's routes serve.

    Attributes:
      name: Name of the model for clients.
      deployment: Config, tokenizer and limits of the model.
      service: Service or router that generates the answers.
      template: Chat template, or None if the model has none.
      limits: Limits of one API call.
      created: Start of the server, in seconds since the epoch.
    """

    name: str
    deployment: ModelInfo
    service: Frontend
    template: ChatTemplate | None
    limits: Limits
    created: int = field(default_factory=lambda: int(time.time()))

    @property
    def tokenizer(self) -> Tokenizer | None:
        """Tokenizer of the model, or None."""
        return self.deployment.model.tokenizer

    def check_name(self, model: str) -> None:
        """Refuses another model.

        Raises:
          NotFound: The model is not the served one.
        """
        if model != self.name:
            raise NotFound(f"model {model!r} is not served here, expected {self.name!r}")

    def check(self, body: Generate, prompts: int) -> None:
        """Refuses a request body that cannot be served, whatever its prompts.

        Args:
          body: Body of the API call.
          prompts: Number of its prompts.

        Raises:
          NotFound: The body asks for another model.
          CmxError: The body asks for too many choices, or has stop strings and the model has no tokenizer.
        """
        self.check_name(self.name if body.model is None else body.model)
        choices = prompts * (body.n or 1)
        if choices > self.limits.max_choices:
            raise CmxError(
                f"{prompts} prompt(s) with n {body.n or 1} are {choices} choices, expected at most "
                f"{self.limits.max_choices}: send several requests"
            )
        if body.stop and self.tokenizer is None:
            raise CmxError("stop strings need a tokenizer, which the model lacks: give stop_token_ids")

    async def encode(self, prompts: Sequence[str | list[int]], special: bool = True) -> list[list[int]]:
        """Returns the token ids of each prompt, checked against the vocabulary.

        Args:
          prompts: Texts or token ids.
          special: Value for `Model.encode`: whether special tokens are added.

        Raises:
          CmxError: A prompt is empty, has an id outside the vocabulary, or is text and the model has no
            tokenizer.
        """
        model = self.deployment.model
        encoded = await asyncio.to_thread(lambda: [model.encode(prompt, special) for prompt in prompts])
        for ids in encoded:
            if not ids:
                raise CmxError("the prompt is empty, expected at least one token")
            for token in ids:
                if not 0 <= token < model.config.vocab_size:
                    raise CmxError(
                        f"the prompt holds token id {token}, expected ids in [0, {model.config.vocab_size})"
                    )
        return encoded

    def params(
        self,
        body: Generate,
        prompt: Sequence[int],
        max_tokens: int | None,
        default: int,
        logprobs: int | None,
    ) -> list[SamplingParams]:
        """Returns the sampling parameters of the `n` choices of a prompt; only their seeds differ.

        Args:
          body: Body of the API call.
          prompt: Token ids of the prompt.
          max_tokens: Requested number of tokens, or None.
          default: Largest number of tokens if none is requested.
          logprobs: Value of `SamplingParams.logprobs`.

        Raises:
          CmxError: A value is outside its range, or prompt and `max_tokens` exceed the model's context.
        """
        longest = self.deployment.max_model_len
        room = longest - len(prompt)
        if room < (1 if max_tokens is None else max_tokens):
            request = "" if max_tokens is None else f" and max_tokens {max_tokens}"
            raise CmxError(
                f"a prompt of {len(prompt)} tokens{request} exceeds max_model_len, {longest} tokens: "
                "shorten the prompt or ask for fewer tokens"
            )
        first = SamplingParams(
            max_tokens=min(default, room) if max_tokens is None else max_tokens,
            temperature=1.0 if body.temperature is None else body.temperature,
            top_p=1.0 if body.top_p is None else body.top_p,
            top_k=0 if body.top_k in (None, -1) else body.top_k,  # in vLLM, -1 keeps all, too
            seed=secrets.randbits(32) if body.seed is None else _mixed(body.seed),
            ignore_eos=bool(body.ignore_eos),
            logprobs=logprobs,
            stop_token_ids=tuple(body.stop_token_ids or ()),
        )
        if (body.min_tokens or 0) > first.max_tokens:
            raise CmxError(
                f"min_tokens is {body.min_tokens}, expected at most max_tokens, {first.max_tokens}"
            )
        return [replace(first, seed=(first.seed + i) % 2**32) for i in range(body.n or 1)]

    def text(self, tokens: list[int]) -> str:
        """Returns the text of tokens, including special ones, or "" without a tokenizer."""
        return "" if self.tokenizer is None else self.tokenizer.decode(tokens, skip_special_tokens=False)

    @cached_property
    def _bytes(self) -> TokenBytes | None:
        return None if self.tokenizer is None else TokenBytes(self.tokenizer)

    def token_bytes(self, token: int) -> bytes:
        """Returns the UTF-8 bytes of a token, which may be part of a character."""
        return self.token_text(token).encode() if self._bytes is None else self._bytes(token)

    def token_text(self, token: int) -> str:
        """Returns the text of a token; of a part of a character `bytes:` and escapes, as OpenAI does."""
        if self._bytes is None:
            return f"token_id:{token}"
        try:
            return self._bytes(token).decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in self._bytes(token))


def _mixed(seed: int) -> int:
    """Returns 32 bits that depend on all 64 of a seed; a seed below 2^32 stays as it is."""
    return (seed ^ (seed >> 32) * 0x9E3779B1) % 2**32
