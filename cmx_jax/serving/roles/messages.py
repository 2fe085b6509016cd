"""JSON messages between router and workers."""

from dataclasses import asdict

from pydantic import BaseModel, ConfigDict, Field

from cmx_jax.serving.kv import KvTransferParams
from cmx_jax.serving.scheduling.request import SamplingParams, TokenLogprob
from cmx_jax.serving.service.counters import EngineCounters, InstanceLoad

LogprobJson = tuple[float, list[tuple[int, float]]]
"""A `TokenLogprob`: log-probability of the token, and pairs of token and log-probability."""


class _Message(BaseModel):
    model_config = ConfigDict(extra="forbid")


class Params(_Message):
    """`SamplingParams` as JSON."""

    max_tokens: int
    temperature: float
    top_k: int
    top_p: float
    seed: int
    ignore_eos: bool
    logprobs: int | None
    stop_token_ids: list[int]

    @classmethod
    def from_sampling(cls, params: SamplingParams) -> "Params":
        """Converts the engine's parameters to a message."""
        return cls(**{**asdict(params), "stop_token_ids": list(params.stop_token_ids)})

    def to_sampling(self) -> SamplingParams:
        """Converts the message to the engine's parameters.

        Raises:
          CmxError: A value is out of range.
        """
        return SamplingParams(**{**self.model_dump(), "stop_token_ids": tuple(self.stop_token_ids)})


class WorkerStatus(BaseModel):
    """Identity and load of a worker.

    Attributes:
      role: Role of the worker, `prefill` or `decode`.
      model: Name of the model's directory.
      max_model_len: Largest number of tokens per sequence.
      fingerprint: Fields of the `Fingerprint` of its pages.
      draining: True while new requests are refused.
      broken: Reason why the worker serves nothing any more, or None.
      instances: Load of each instance.
      counters: Counters and gauges of the worker.
      kv: Number of transfers that are `waiting` to be fetched, and the counts of `LeasedPages`.
    """

    role: str
    model: str
    max_model_len: int
    fingerprint: dict[str, str | int | list[int]]
    draining: bool
    broken: str | None
    instances: list[InstanceLoad]
    counters: EngineCounters
    kv: dict[str, int]


class PrefillRequest(_Message):
    """Asks for a prompt to be run and its pages to be kept.

    The router chooses the transfer id, so that it can withdraw the pages whether or not the answer arrives.
    """

    prompt: list[int]
    params: Params
    transfer_id: int
    priority: int = 0
    namespace: str = ""


class PrefillAnswer(_Message):
    """The first token of an answer, with a ticket for the pages unless it is the last token as well."""

    token: int
    logprob: LogprobJson | None = None
    drafts: list[int] = Field(default_factory=list)
    reused_tokens: int = 0
    finish_reason: str | None = None
    kv_transfer_params: KvTransferParams | None = None


class DecodeRequest(_Message):
    """Asks for a prompt to be continued; `control` is the URL of the worker that keeps its pages."""

    prompt: list[int]
    params: Params
    priority: int = 0
    first: int
    logprob: LogprobJson | None = None
    drafts: list[int]
    control: str
    kv_transfer_params: KvTransferParams


class DecodeLine(_Message):
    """One line of a decode worker's answer: new tokens, and in the last line the reason why they end."""

    tokens: list[int] = Field(default_factory=list)
    logprobs: list[LogprobJson] = Field(default_factory=list)
    finish_reason: str | None = None
    error: str | None = None


class ScoreRequest(_Message):
    """Asks for the log-probability of each token of prompts, and of the `top` most likely tokens."""

    prompts: list[list[int]]
    top: int


def logprobs_to_json(logprobs: list[TokenLogprob]) -> list[LogprobJson]:
    """Converts the engine's log-probabilities to JSON."""
    return [(entry.logprob, list(entry.top)) for entry in logprobs]


def logprobs_from_json(logprobs: list[LogprobJson]) -> list[TokenLogprob]:
    """Converts log-probabilities from JSON to the engine's form."""
    return [TokenLogprob(logprob, [(token, p) for token, p in top]) for logprob, top in logprobs]
