"""A request and its states.

    WAITING    in the queue, with neither pages nor a rank
    PREFILL    has pages on a rank of a prefill instance; its prompt runs there, in chunks if it is long
    TRANSFER   has its first token; its pages wait for room on a decode rank
    DECODE     has a row and pages on a decode rank; every step generates one token, and one for each draft
               that was right
    FINISHED   reached its length or an end token, was cancelled, or failed; it holds nothing

On an instance that does both, PREFILL goes to DECODE directly: the pages stay where they are.

From every state but the last a request may go back to WAITING: it was preempted, or its instance leaves. It
keeps its tokens, and the next prefill runs the prompt and these (`prefill_tokens`). From every state it may
go to FINISHED, when it is cancelled.
"""

import enum
import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from cmx_jax.errors import CmxError
from cmx_jax.model.sampling import MAX_LOGPROBS


class State(enum.Enum):
    WAITING = "waiting"
    PREFILL = "prefill"
    TRANSFER = "transfer"
    DECODE = "decode"
    FINISHED = "finished"

    __hash__ = object.__hash__  # Enum's own is slow, and the simulator moves millions of requests


TRANSITIONS: dict[State, frozenset[State]] = {
    State.WAITING: frozenset({State.PREFILL, State.FINISHED}),
    State.PREFILL: frozenset({State.TRANSFER, State.DECODE, State.FINISHED, State.WAITING}),
    State.TRANSFER: frozenset({State.DECODE, State.FINISHED, State.WAITING}),
    State.DECODE: frozenset({State.FINISHED, State.WAITING}),
    State.FINISHED: frozenset(),
}


class Overloaded(CmxError):
    """A queue is full.

    Attributes:
      retry_after_s: Seconds after which it may have room.
    """

    def __init__(self, message: str, retry_after_s: float):
        super().__init__(message)
        self.retry_after_s = retry_after_s


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """Sampling parameters of a request, with vLLM's names.

    Attributes:
      max_tokens: Largest number of tokens to generate.
      temperature: Temperature; 0 is greedy.
      top_k: Number of most likely tokens to sample from; 0: all.
      top_p: Probability mass of the most likely tokens to sample from; 0 keeps only the most likely one.
      seed: Seed of the draws.
      ignore_eos: True if the model's end tokens do not end the text.
      logprobs: Number of most likely tokens to report at each position, beside the sampled one; None: no
        log-probabilities.
      stop_token_ids: Tokens that end the text, as the model's own end tokens do.

    Raises:
      CmxError: A value is outside its range.
    """

    max_tokens: int = 64
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0
    ignore_eos: bool = False
    logprobs: int | None = None
    stop_token_ids: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        for ok, name, expected in (
            (self.max_tokens >= 1, "max_tokens", "at least 1"),
            (0 <= self.temperature < float("inf"), "temperature", "zero or more"),
            (0 <= self.top_k < 2**31, "top_k", "zero (off) or more, below 2^31"),
            (0 <= self.top_p <= 1, "top_p", "in [0, 1]"),
            (0 <= self.seed < 2**32, "seed", "in [0, 2^32)"),
            (0 <= (self.logprobs or 0) <= MAX_LOGPROBS, "logprobs", f"at most {MAX_LOGPROBS}"),
        ):
            if not ok:
                raise CmxError(f"{name} is {getattr(self, name)}, expected {expected}")


_ids = itertools.count()


class TokenLogprob(NamedTuple):
    """Log-probability of a token, before temperature.

    Attributes:
      logprob: Log-probability of the token.
      top: Most likely tokens at its position, with their log-probabilities.
    """

    logprob: float
    top: list[tuple[int, float]]


@dataclass(eq=False)
class Request:
    """One prompt and its course; times are seconds of the scheduler's clock.

    Attributes:
      prompt: Token ids of the prompt.
      params: Sampling parameters.
      id: Number of the request, unique in the process.
      priority: Priority; smaller numbers go first (vLLM's order), and are preempted last.
      namespace: Namespace of the caching pool; nothing is shared between two of them.
      state: State of the request.
      tokens: Generated tokens.
      prefill_tokens: Tokens that prefill runs: the prompt and, after a preemption, the generated tokens.
      prefilled: Number of `prefill_tokens` that have KV rows in pages.
      next_token: The token after `prefill_tokens`; -1 until prefill has run.
      drafts: Tokens that the MTP layer expects after `tokens`.
      logprobs: Log-probability of each generated token, where it was asked for.
      cached_tokens: Number of prompt tokens that came from the caching pool.
      stored_tokens: Number of leading tokens whose blocks are in the caching pool.
      preemptions: Number of times that the request was preempted.
      transfer_id: Id for the ticket of its pages, if they go to another process; 0: any.
      finish_reason: `stop`, `length`, `abort` (cancelled), `error`, `transfer` (another process continues) or
        `preempted` (its sender prefills it again); None while it runs.
      error: Error message, or None.
      arrived: Time of arrival.
      first_token: Time of the first token, or None.
      finished: Time at which it finished, or None.
    """

    prompt: Sequence[int]
    params: SamplingParams
    id: int = field(default_factory=lambda: next(_ids))
    priority: int = 0
    namespace: str = ""
    state: State = State.WAITING
    tokens: list[int] = field(default_factory=list)
    prefilled: int = 0
    next_token: int = -1
    drafts: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    cached_tokens: int = 0
    stored_tokens: int = 0
    preemptions: int = 0
    transfer_id: int = 0
    finish_reason: str | None = None
    error: str | None = None
    arrived: float = 0.0
    first_token: float | None = None
    finished: float | None = None

    def __post_init__(self) -> None:
        self.prefill_tokens = self.prompt

    def to(self, state: State) -> None:
        """Enters a state, along `TRANSITIONS` only."""
        if state not in TRANSITIONS[self.state]:
            raise RuntimeError(f"request {self.id}: {self.state.name} cannot become {state.name}")
        self.state = state

    @property
    def total_tokens(self) -> int:
        """Number of tokens of the prompt and the longest answer."""
        return len(self.prompt) + self.params.max_tokens

    @property
    def max_kv_tokens(self) -> int:
        """Largest number of tokens with KV rows: the last token is never attended to."""
        return self.total_tokens - 1

    def add(self, token: int, eos: tuple[int, ...]) -> bool:
        """Appends a generated token; returns whether it was the last."""
        self.tokens.append(token)
        if (token in eos and not self.params.ignore_eos) or token in self.params.stop_token_ids:
            self.finish_reason = "stop"
        elif len(self.tokens) == self.params.max_tokens:
            self.finish_reason = "length"
        return self.finish_reason is not None

    def requeue(self) -> None:
        """Goes back to WAITING and keeps its tokens; the caller frees its pages."""
        self.prefill_tokens = [*self.prompt, *self.tokens] if self.tokens else self.prompt
        self.prefilled, self.next_token, self.drafts = 0, -1, []
        self.preemptions += 1
        self.to(State.WAITING)

    @property
    def ttft_s(self) -> float:
        """Time to first token in seconds, from arrival."""
        return (self.first_token or self.arrived) - self.arrived

    @property
    def tpot_s(self) -> float:
        """Mean time per output token after the first in seconds; 0 with a single token."""
        if self.finished is None or self.first_token is None or len(self.tokens) < 2:
            return 0.0
        return (self.finished - self.first_token) / (len(self.tokens) - 1)
