"""The model that an app serves: prompts to tokens, requests to generations, within limits."""

import asyncio
import secrets
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from tokenizers import Tokenizer

from cmx_jax.errors import CmxError
from cmx_jax.serving.api.schemas import Generate
from cmx_jax.serving.api.template import ChatTemplate
from cmx_jax.serving.deploy.deployment import ModelInfo
from cmx_jax.serving.http.errors import NotFound
from cmx_jax.serving.scheduling.request import SamplingParams, TokenLogprob
from cmx_jax.serving.service.frontend import Frontend

Scores = list[list[TokenLogprob | None]]


@dataclass(frozen=True, kw_only=True)
class Limits:
    """Of one call of the API.

    Attributes:
      max_body_bytes: of its body.
      max_choices: prompts times `n`.
    """

    max_body_bytes: int = 8 << 20
    max_choices: int = 256

    def __post_init__(self) -> None:
        for name in ("max_body_bytes", "max_choices"):
            if getattr(self, name) < 1:
                raise CmxError(f"{name} is {getattr(self, name)}, expected at least 1")


@dataclass(frozen=True, kw_only=True)
class Served:
    """A deployment behind a service or a router, and the name that clients know it by."""

    name: str
    deployment: ModelInfo
    service: Frontend
    template: ChatTemplate | None
    limits: Limits
    created: int = field(default_factory=lambda: int(time.time()))

    @property
    def tokenizer(self) -> Tokenizer | None:
        return self.deployment.model.tokenizer

    def check_name(self, model: str) -> None:
        """Refuses another model.

        Raises:
          NotFound: it is not the one that is served.
        """
        if model != self.name:
            raise NotFound(f"model {model!r} is not served here, expected {self.name!r}")

    def check(self, body: Generate, prompts: int) -> None:
        """Refuses what no prompt could make right.

        Raises:
          NotFound: it asks for another model.
          CmxError: it asks for too many choices, or for text of a model without a tokenizer.
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
        """Token ids of each prompt, checked against the vocabulary; `special` as in `Model.encode`.

        Raises:
          CmxError: one is empty, or holds another id, or is text and the model has no tokenizer.
        """
        model = self.deployment.model
        found = await asyncio.to_thread(lambda: [model.encode(prompt, special) for prompt in prompts])
        for ids in found:
            if not ids:
                raise CmxError("the prompt is empty, expected at least one token")
            for token in ids:
                if not 0 <= token < model.config.vocab_size:
                    raise CmxError(
                        f"the prompt holds token id {token}, expected ids in [0, {model.config.vocab_size})"
                    )
        return found

    def params(
        self, body: Generate, prompt: Sequence[int], max_tokens: int | None, usual: int, logprobs: int | None
    ) -> list[SamplingParams]:
        """Of each of the `n` choices behind a prompt; they differ by their seeds.

        Args:
          body: what was asked for.
          prompt: token ids.
          max_tokens: that were asked for.
          usual: most tokens where nothing was asked for.
          logprobs: see `SamplingParams`.

        Raises:
          CmxError: a value is outside its range, or prompt and `max_tokens` exceed the room there is.
        """
        longest = self.deployment.max_model_len
        room = longest - len(prompt)
        if room < (1 if max_tokens is None else max_tokens):
            asked = "" if max_tokens is None else f" and max_tokens {max_tokens}"
            raise CmxError(
                f"a prompt of {len(prompt)} tokens{asked} exceed the {longest} tokens that there is room for "
                "(max_model_len): shorten the prompt or ask for fewer tokens"
            )
        first = SamplingParams(
            max_tokens=min(usual, room) if max_tokens is None else max_tokens,
            temperature=1.0 if body.temperature is None else body.temperature,
            top_p=1.0 if body.top_p is None else body.top_p,
            top_k=0 if body.top_k in (None, -1) else body.top_k,  # vLLM: -1 keeps all, too
            seed=secrets.randbits(32) if body.seed is None else body.seed,
            ignore_eos=body.ignore_eos,
            logprobs=logprobs,
            stop_token_ids=tuple(body.stop_token_ids or ()),
        )
        return [replace(first, seed=(first.seed + i) % 2**32) for i in range(body.n or 1)]

    def text(self, tokens: list[int]) -> str:
        """Text of tokens, special ones too."""
        return "" if self.tokenizer is None else self.tokenizer.decode(tokens, skip_special_tokens=False)

    def token_text(self, token: int) -> str:
        """A token by itself; bytes that are no character are U+FFFD."""
        return f"token_id:{token}" if self.tokenizer is None else self.text([token])
