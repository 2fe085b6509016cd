"""Seconds of steps and transfers: a protocol, and the simplest model that follows it."""

from dataclasses import dataclass, fields
from math import inf
from typing import Protocol, runtime_checkable

from cmx_jax.errors import CmxError
from cmx_jax.serving.scheduling.packing import Piece


@runtime_checkable
class StepTimes(Protocol):
    """Seconds of steps and transfers; constants, measurements or predictions."""

    def prefill(self, pieces: list[list[Piece]]) -> float:
        """Seconds of a prefill step that runs these pieces of prompts, by row."""

    def decode(self, sequences: int, context: float) -> float:
        """Seconds of a decode step.

        Args:
          sequences: Sequences of the busiest rank; all ranks step together.
          context: Tokens that each sequence attends to, on average.
        """

    def transfer(self, tokens: int) -> float:
        """Seconds to move a prompt's KV rows from one idle prefill rank to one idle decode rank."""

    def fetch(self, tokens: int) -> float:
        """Seconds to fetch the KV rows of a cached prefix."""


@dataclass(frozen=True, kw_only=True)
class Linear:
    """Times that grow linearly, in milliseconds.

    Attributes:
      prefill_ms: Fixed time of a prefill step.
      prefill_ms_per_1k: Time per 1,000 tokens of a prefill step's longest row.
      decode_ms: Time of a decode step with one sequence on the busiest rank.
      decode_ms_per_sequence: Time per further sequence on the busiest rank.
      decode_ms_per_1m: Time per 1,000,000 cached tokens on the busiest rank.
      transfer_ms_per_1k: Time to move the KV rows of 1,000 tokens to decode.
      fetch_ms_per_1k: Time to fetch the KV rows of 1,000 tokens from the prefix cache.

    Raises:
      CmxError: A time is negative.
    """

    prefill_ms: float = 0.0
    prefill_ms_per_1k: float = 0.0
    decode_ms: float = 0.0
    decode_ms_per_sequence: float = 0.0
    decode_ms_per_1m: float = 0.0
    transfer_ms_per_1k: float = 0.0
    fetch_ms_per_1k: float = 0.0

    def __post_init__(self) -> None:
        for f in fields(self):
            if not 0 <= getattr(self, f.name) < inf:
                raise CmxError(f"{f.name} is {getattr(self, f.name):g}, expected zero or more")

    def prefill(self, pieces: list[list[Piece]]) -> float:
        longest = max([sum([piece.stop - piece.start for piece in row]) for row in pieces])
        return (self.prefill_ms + self.prefill_ms_per_1k * longest / 1e3) / 1e3

    def decode(self, sequences: int, context: float) -> float:
        batch_ms = self.decode_ms_per_sequence * (sequences - 1)
        batch_ms += self.decode_ms_per_1m * sequences * context / 1e6
        return (self.decode_ms + batch_ms) / 1e3

    def transfer(self, tokens: int) -> float:
        return self.transfer_ms_per_1k * tokens / 1e6

    def fetch(self, tokens: int) -> float:
        return self.fetch_ms_per_1k * tokens / 1e6
