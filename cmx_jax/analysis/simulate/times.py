"""What steps and transfers take: a protocol, and the simplest model that follows it."""

from dataclasses import dataclass, fields
from math import inf
from typing import Protocol, runtime_checkable

from cmx_jax.errors import CmxError
from cmx_jax.serving.scheduling.packing import Piece


@runtime_checkable
class StepTimes(Protocol):
    """Seconds; constants, measurements or predictions."""

    def prefill(self, pieces: list[list[Piece]]) -> float:
        """Of a prefill step that runs these pieces of prompts, by row."""

    def decode(self, sequences: int, context: float) -> float:
        """Of a decode step with `sequences` on the busiest rank (all ranks step together), which attend to
        `context` tokens each on average."""

    def transfer(self, tokens: int) -> float:
        """Of moving the rows of a prompt from one prefill rank to one decode rank that are not busy."""

    def fetch(self, tokens: int) -> float:
        """Of fetching the rows of a cached prefix."""


@dataclass(frozen=True, kw_only=True)
class Linear:
    """Times that grow linearly; milliseconds.

    Attributes:
      prefill_ms: of a prefill step, however short.
      prefill_ms_per_1k: of 1,000 tokens of its longest row.
      decode_ms: of a decode step with one sequence a rank.
      decode_ms_per_sequence: of each further one on the busiest rank.
      decode_ms_per_1m: of 1,000,000 cached tokens on that rank.
      transfer_ms_per_1k: of 1,000 tokens' rows.
      fetch_ms_per_1k: of 1,000 tokens' rows out of the prefix cache.

    Raises:
      CmxError: a time is negative.
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
        more = (
            self.decode_ms_per_sequence * (sequences - 1) + self.decode_ms_per_1m * sequences * context / 1e6
        )
        return (self.decode_ms + more) / 1e3

    def transfer(self, tokens: int) -> float:
        return self.transfer_ms_per_1k * tokens / 1e6

    def fetch(self, tokens: int) -> float:
        return self.fetch_ms_per_1k * tokens / 1e6
