"""A request and the states it goes through.

    WAITING    in the queue: it has neither pages nor a rank
    PREFILL    it has pages on a rank of a prefill instance; its prompt runs there, in chunks if it is long
    TRANSFER   its first token is known; its pages wait for room on a decode rank
    DECODE     it has a row and pages on a decode rank; every step gives it one token, and one for each
             draft that was right
    FINISHED   it reached its length or an end token, was cancelled, or failed; it holds nothing

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
    """A queue is full; it may have room after `retry_after_s` seconds."""

    def __init__(self, message: str, retry_after_s: float):
        super().__init__(message)
        self.retry_after_s = retry_after_s


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """How a request is continued; vLLM's names.

    Attributes:
      logprobs: how many of the likeliest tokens are reported at each position, beside the one taken; None:
        nothing is.
      stop_token_ids: tokens that end it, as the model's own end tokens do.

    Raises:
      CmxError: a value is outside its range.
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
            (0 < self.top_p <= 1, "top_p", "in (0, 1]"),
            (0 <= self.seed < 2**32, "seed", "in [0, 2^32)"),
            (0 <= (self.logprobs or 0) <= MAX_LOGPROBS, "logprobs", f"at most {MAX_LOGPROBS}"),
        ):
            if not ok:
                raise CmxError(f"{name} is {getattr(self, name)}, expected {expected}")


_ids = itertools.count()


class TokenLogprob(NamedTuple):
    """The logarithm of a token's probability, before temperature; and the likeliest tokens with theirs."""

    logprob: float
    top: list[tuple[int, float]]


@dataclass(eq=False)
class Request:
    """One prompt on its way; times are seconds of the scheduler's clock.

    Attributes:
      priority: smaller ones go first (vLLM's order), and are preempted last.
      namespace: of the caching pool; nothing is shared between two.
      prefill_tokens: what prefill runs: the prompt, and behind a preemption what was generated before it.
      prefilled: tokens of `prefill_tokens` that lie in pages.
      next_token: the token behind `prefill_tokens`, once it is known.
      drafts: what the MTP layer expects behind `tokens`.
      logprobs: of each token, where they were asked for.
      cached_tokens: of the prompt, that came out of the caching pool.
      stored_tokens: from the first on, whose blocks are there.
      transfer_id: of its pages' ticket, if they go to another process; 0: any.
      finish_reason: `stop`, `length`, `abort` (cancelled) or `error`.
      error: what went wrong.
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
        """Moves on, along `TRANSITIONS` only."""
        if state not in TRANSITIONS[self.state]:
            raise RuntimeError(f"request {self.id}: {self.state.name} cannot become {state.name}")
        self.state = state

    @property
    def total_tokens(self) -> int:
        """Prompt and the most that may follow."""
        return len(self.prompt) + self.params.max_tokens

    @property
    def max_kv_tokens(self) -> int:
        """Tokens that the cache must hold at most: the last one is never attended to."""
        return self.total_tokens - 1

    def add(self, token: int, eos: tuple[int, ...]) -> bool:
        """Takes the next token; True when it was the last."""
        self.tokens.append(token)
        if (token in eos and not self.params.ignore_eos) or token in self.params.stop_token_ids:
            self.finish_reason = "stop"
        elif len(self.tokens) == self.params.max_tokens:
            self.finish_reason = "length"
        return self.finish_reason is not None

    def requeue(self) -> None:
        """Goes back to the queue with what it has; its pages are released by whoever calls this."""
        self.prefill_tokens = [*self.prompt, *self.tokens] if self.tokens else self.prompt
        self.prefilled, self.next_token, self.drafts = 0, -1, []
        self.preemptions += 1
        self.to(State.WAITING)

    @property
    def ttft_s(self) -> float:
        """Time to first token, from arrival, seconds."""
        return (self.first_token or self.arrived) - self.arrived

    @property
    def tpot_s(self) -> float:
        """Mean time of each further token, seconds (0 with a single one)."""
        if self.finished is None or self.first_token is None or len(self.tokens) < 2:
            return 0.0
        return (self.finished - self.first_token) / (len(self.tokens) - 1)
