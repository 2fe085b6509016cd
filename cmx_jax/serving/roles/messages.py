"""What router and workers say to each other, in JSON."""

from dataclasses import asdict
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from cmx_jax.serving.scheduling.request import SamplingParams, TokenLogprob

Said = tuple[float, list[tuple[int, float]]]  # a TokenLogprob


class _Message(BaseModel):
    model_config = ConfigDict(extra="forbid")


class Params(_Message):
    """`SamplingParams`."""

    max_tokens: int
    temperature: float
    top_k: int
    top_p: float
    seed: int
    ignore_eos: bool
    logprobs: int | None
    stop_token_ids: list[int]

    @classmethod
    def of(cls, params: SamplingParams) -> "Params":
        return cls(**{**asdict(params), "stop_token_ids": list(params.stop_token_ids)})

    def sampling(self) -> SamplingParams:
        """As the engine has them.

        Raises:
          CmxError: one is out of range.
        """
        return SamplingParams(**{**self.model_dump(), "stop_token_ids": tuple(self.stop_token_ids)})


class WorkerStatus(BaseModel):
    """Who a worker is, and how much it has to do.

    Attributes:
      fingerprint: of its pages.
      broken: why it serves nothing any more, or None.
      counts, instances: see `Service`.
      kv: pages that wait to be fetched, and what became of others.
    """

    role: str
    model: str
    max_model_len: int
    fingerprint: dict[str, Any]
    draining: bool
    broken: str | None
    instances: list[dict[str, Any]]
    counts: dict[str, int | float]
    kv: dict[str, int]


class PrefillRequest(_Message):
    """Run a prompt and keep its pages, under an id by which they can be withdrawn whether or not the answer
    arrived."""

    prompt: list[int]
    params: Params
    transfer_id: int
    priority: int = 0
    namespace: str = ""


class PrefillAnswer(_Message):
    """The token behind a prompt; the ticket is missing where it was the last one."""

    token: int
    logprob: Said | None = None
    drafts: list[int] = Field(default_factory=list)
    reused_tokens: int = 0
    finish_reason: str | None = None
    kv_transfer_params: dict[str, Any] | None = None


class DecodeRequest(_Message):
    """Continue a prompt whose pages `control` keeps, an URL of the worker that prefilled it."""

    prompt: list[int]
    params: Params
    priority: int = 0
    first: int
    logprob: Said | None = None
    drafts: list[int]
    control: str
    kv_transfer_params: dict[str, Any]


class DecodeLine(_Message):
    """A line of what a decode worker answers: tokens, then why they end."""

    tokens: list[int] = Field(default_factory=list)
    logprobs: list[Said] = Field(default_factory=list)
    finish_reason: str | None = None
    error: str | None = None


class ScoreRequest(_Message):
    """Say of each token how likely it was."""

    prompts: list[list[int]]
    top: int


def said(logprobs: list[TokenLogprob]) -> list[Said]:
    """As JSON has them."""
    return [(of.logprob, list(of.top)) for of in logprobs]


def heard(logprobs: list[Said]) -> list[TokenLogprob]:
    """As the engine has them."""
    return [TokenLogprob(logprob, [(token, p) for token, p in top]) for logprob, top in logprobs]
