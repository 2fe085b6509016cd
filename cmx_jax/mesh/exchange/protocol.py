"""Types of the token exchange.

Letters in shapes: `Z` rows of a message buffer, `M` elements of a message.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, runtime_checkable

from flax import struct
from jaxtyping import Array, Float, Int, Shaped

from cmx_jax.mesh.exchange.axis_collectives import Axis
from cmx_jax.mesh.exchange.message import Wire

ExpertFn = Callable[[Shaped[Array, "Z M"], Int[Array, " Z"], Wire], Float[Array, "Z D"]]
"""Runs the local experts: takes received rows, the local slot of each (-1 for an empty row) and the reader of
the rows; returns a result for each row. Results of empty rows may hold anything."""


@dataclass(frozen=True)
class ExchangeArgs:
    """Settings of one exchange.

    Attributes:
      axis: Mesh axis (or axes) of the expert-parallel ranks.
      slots_per_rank: Expert slots of each rank: rank `r` owns slots `[r * slots_per_rank,
        (r + 1) * slots_per_rank)`.
      rows: Messages for each peer in one round.
      wire: Type of dispatched tokens, one of `WIRES`.
    """

    axis: Axis
    slots_per_rank: int
    rows: int
    wire: str


@struct.dataclass
class ExchangeStats:
    """Counters of one exchange on one rank. Scalars, which the runners stack over ranks.

    Attributes:
      rounds: Number of rounds, int32.
      sent: Messages that this rank sent, those to its own experts included, int32.
      received: Messages that this rank's experts answered, int32.
    """

    rounds: Any
    sent: Any
    received: Any


@runtime_checkable
class Exchange(Protocol):
    """Signature of every exchange method."""

    def __call__(
        self,
        x: Float[Array, "T D"],
        slots: Int[Array, "T K"],
        weights: Float[Array, "T K"],
        experts: ExpertFn,
        args: ExchangeArgs,
    ) -> tuple[Float[Array, "T D"], ExchangeStats]:
        """Sends tokens to their experts and sums the weighted results.

        Args:
          x: Tokens of this rank.
          slots: Global expert slots of each token, all different; -1 sends nothing.
          weights: Weight of each expert's result in the sum. Weights of slot -1 are ignored.
          experts: Runs the local experts.
          args: Settings.

        Returns:
          `sum_k weights[t, k] * expert_{slots[t, k]}(x[t])`, and the counters of this rank.
        """
        ...


class Route(NamedTuple):
    """Way of one round's messages to their ranks and of the results back.

    Attributes:
      start: Row of the outbox at which the messages for each rank begin.
      size: Rows of the outbox.
      dispatch: Moves the outbox `[size, M]` to the receiving ranks and returns what this rank received; rows
        without a message are zeros.
      combine: Moves the results of received rows back and returns the results `[size, D]` in the rows of the
        outbox that they answer; other rows may hold anything.
    """

    start: Int[Array, " G"]
    size: int
    dispatch: Callable[[Shaped[Array, "Z M"]], Shaped[Array, "Z M"]]
    combine: Callable[[Float[Array, "Z D"]], Float[Array, "Z D"]]


MakeRoute = Callable[[Int[Array, " G"], int, int, Axis], Route]
"""Makes the route of a round. Takes the number of messages for each rank in this round, the largest number
that it can be (`rows`), the number of messages of this rank in all rounds, and the axis."""
