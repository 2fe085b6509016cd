"""The ranks of an instance as the scheduler sees them: who holds which row and page, what is prefilled next.

Nothing here knows how a step is run: `Instance` runs it with JAX, the simulator on a virtual clock.
"""

import heapq
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from cmx_jax.serving.scheduling.packing import Piece, schedule
from cmx_jax.serving.scheduling.pages import PagePool, pages_for
from cmx_jax.serving.scheduling.request import Request, State


@dataclass(frozen=True, kw_only=True)
class Capacity:
    """What each rank of an instance has room for."""

    sequences: int = 4  # rows of the decode batch
    pages: int = 64
    page_width: int = 16  # tokens of a page
    max_num_batched_tokens: int = (
        2048  # of a row of the prefill batch: longer prompts are prefilled in chunks
    )


class Place(NamedTuple):
    """Where a request lies on an instance: its rank, pages there, and row of the decode batch (or None)."""

    rank: int
    pages: list[int]
    row: int | None


class RankAllocator:
    """Ranks that have sequences of their own, each with the same capacity.

    Attributes:
      rows: of the decode batch, rank by rank: who holds each.
      places: of all requests that are here.
      prefilling: those whose prompts are not through, in order.
      load: pages in use, what the scheduler balances.
    """

    def __init__(self, name: str, capacity: Capacity, ranks: int, prefill_rows: int = 1):
        self.name, self.capacity, self.ranks, self.prefill_rows = name, capacity, ranks, prefill_rows
        self.reset()

    def reset(self) -> None:
        """Forgets all requests."""
        ranks, rows = self.ranks, self.capacity.sequences
        self.pools = [PagePool(self.capacity.pages) for _ in range(ranks)]
        self.rows: list[Request | None] = [None] * (ranks * rows)
        self.places: dict[Request, Place] = {}
        self.prefilling: list[Request] = []
        self.load = 0
        self._held = np.zeros(ranks, np.int64)  # pages by rank
        self._free_rows = [list(range(rank * rows, (rank + 1) * rows)) for rank in range(ranks)]  # heaps
        self._full = np.zeros(ranks, np.int64)  # where no row is free: more than any number of pages

    def place(self, request: Request, tokens: int, decode: bool, spare: int = 0) -> bool:
        """Gives a request pages for `tokens` tokens on the emptiest rank, and a row there if it will decode.

        Args:
          request: without a place here.
          tokens: that it needs pages for.
          decode: whether it will decode.
          spare: pages that are to stay free for each sequence that decodes on the rank, which will grow.

        Returns:
          False, with nothing changed, if no rank has room.
        """
        need = pages_for(tokens, self.capacity.page_width)
        rank = int((self._held + self._full if decode else self._held).argmin()) if self.ranks > 1 else 0
        if self.pools[rank].free < need or (decode and not self._free_rows[rank]):
            return False
        running = self.capacity.sequences - len(self._free_rows[rank])
        if decode and self.pools[rank].free < need + spare * running:
            return False
        row = None
        if decode:
            row = heapq.heappop(self._free_rows[rank])
            self.rows[row] = request
            self._full[rank] = 0 if self._free_rows[rank] else self.capacity.pages + 1
        self.places[request] = Place(rank, self.pools[rank].take(need), row)
        self._hold(rank, need)
        return True

    def grow(self, request: Request, tokens: int) -> bool:
        """Gives a placed request further pages, so that it has them for `tokens` tokens; False if its rank
        has no more."""
        place = self.places[request]
        more = pages_for(tokens, self.capacity.page_width) - len(place.pages)
        if more > self.pools[place.rank].free:
            return False
        if more > 0:
            place.pages.extend(self.pools[place.rank].take(more))
            self._hold(place.rank, more)
        return True

    def release(self, request: Request) -> None:
        """Takes back all that a request holds."""
        place = self.places.pop(request)
        if request in self.prefilling:
            self.prefilling.remove(request)
        self.pools[place.rank].give_back(place.pages)
        self._hold(place.rank, -len(place.pages))
        if place.row is not None:
            self.rows[place.row] = None
            heapq.heappush(self._free_rows[place.rank], place.row)
            self._full[place.rank] = 0

    def _hold(self, rank: int, pages: int) -> None:
        self._held[rank] += pages
        self.load += pages

    @property
    def decodes(self) -> bool:
        """Whether any sequence decodes here."""
        return any(r is not None and r.state is State.DECODE for r in self.rows)

    def next_pieces(self) -> list[list[Piece]]:
        """The chunks of placed prompts that the next prefill step runs, by row."""
        room = self.capacity
        placed = ((request, self.places[request].rank) for request in self.prefilling)
        return schedule(placed, self.ranks, self.prefill_rows, room.max_num_batched_tokens, room.page_width)

    def prefilled(self, pieces: list[list[Piece]]) -> list[tuple[Request, int, int]]:
        """Notes that pieces have run.

        Returns:
          the requests whose prompts are through, each with the row and the place in it of its last piece.
        """
        through = []
        for row, of in enumerate(pieces):
            for n, piece in enumerate(of):
                piece.request.prefilled = piece.stop
                if piece.stop == len(piece.request.prefill_tokens):
                    self.prefilling.remove(piece.request)
                    through.append((piece.request, row, n))
        return through
