"""A request and the states it goes through.

    WAITING    in the queue: it has neither pages nor a rank
    PREFILL    it has pages on a rank of a prefill instance; its prompt runs there, in chunks if it is long
    TRANSFER   its first token is known; its pages wait for room on a decode rank
    DECODE     it has a row and pages on a decode rank; every step gives it one token, and one for each
             draft that was right
    FINISHED   it reached its length or an end token; it holds nothing

On an instance that does both, PREFILL goes to DECODE directly: the pages stay where they are.
"""

import enum
import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field

from cmx_jax.errors import CmxError


class State(enum.Enum):
    WAITING = "waiting"
    PREFILL = "prefill"
    TRANSFER = "transfer"
    DECODE = "decode"
    FINISHED = "finished"

    __hash__ = object.__hash__  # Enum's own is slow, and the simulator moves millions of requests


TRANSITIONS: dict[State, frozenset[State]] = {
    State.WAITING: frozenset({State.PREFILL}),
    State.PREFILL: frozenset({State.TRANSFER, State.DECODE, State.FINISHED}),
    State.TRANSFER: frozenset({State.DECODE}),
    State.DECODE: frozenset({State.FINISHED}),
    State.FINISHED: frozenset(),
}


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """How a request is continued; vLLM's names.

    Raises:
      CmxError: a value is outside its range.
    """

    max_tokens: int = 64
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0
    ignore_eos: bool = False

    def __post_init__(self) -> None:
        for ok, name, expected in (
            (self.max_tokens >= 1, "max_tokens", "at least 1"),
            (0 <= self.temperature < float("inf"), "temperature", "zero or more"),
            (0 <= self.top_k < 2**31, "top_k", "zero (off) or more, below 2^31"),
            (0 < self.top_p <= 1, "top_p", "in (0, 1]"),
            (0 <= self.seed < 2**32, "seed", "in [0, 2^32)"),
        ):
            if not ok:
                raise CmxError(f"{name} is {getattr(self, name)}, expected {expected}")


_ids = itertools.count()


@dataclass(eq=False)
class Request:
    """One prompt on its way; times are seconds of the scheduler's clock."""

    prompt: Sequence[int]
    params: SamplingParams
    id: int = field(default_factory=lambda: next(_ids))
    state: State = State.WAITING
    tokens: list[int] = field(default_factory=list)
    prefilled: int = 0  # tokens of the prompt that lie in pages
    first: int = -1  # the token behind the prompt, once it is known
    drafts: list[int] = field(default_factory=list)  # what the MTP layer expects behind `tokens`
    finish_reason: str | None = None
    arrived: float = 0.0
    first_token: float | None = None
    finished: float | None = None

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
    def cached_tokens(self) -> int:
        """Tokens that the cache must hold at most: the last one is never attended to."""
        return self.total_tokens - 1

    def add(self, token: int, eos: tuple[int, ...]) -> bool:
        """Takes the next token; True when it was the last."""
        self.tokens.append(token)
        if token in eos and not self.params.ignore_eos:
            self.finish_reason = "stop"
        elif len(self.tokens) == self.params.max_tokens:
            self.finish_reason = "length"
        return self.finish_reason is not None

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
