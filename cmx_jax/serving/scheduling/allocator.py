"""Allocates the rows and pages of an instance's ranks, and chooses the chunks of the next prefill step.

Nothing here knows how a step is run: `Instance` runs it with JAX, the simulator on a virtual clock.
"""

import heapq
from collections.abc import Collection
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from cmx_jax.serving.scheduling.packing import Piece, schedule
from cmx_jax.serving.scheduling.pages import PagePool, pages_for
from cmx_jax.serving.scheduling.request import Request, State


@dataclass(frozen=True, kw_only=True)
class Capacity:
    """Capacity of each rank of an instance.

    Attributes:
      sequences: Number of rows of the decode batch.
      pages: Number of KV pages.
      page_width: Tokens per page.
      max_num_batched_tokens: Tokens per row of the prefill batch; longer prompts are prefilled in chunks.
    """

    sequences: int = 4
    pages: int = 64
    page_width: int = 16
    max_num_batched_tokens: int = 2048


class Place(NamedTuple):
    """A request's rank on an instance, its pages there, and its row of the decode batch (or None)."""

    rank: int
    pages: list[int]
    row: int | None


def spread_order(ranks: int) -> np.ndarray:
    """Returns ranks `[ranks]` so that any first few of them lie far apart: on different NPUs and nodes.

    Equally loaded ranks are taken in this order. It is the order of their numbers' bits read backwards (van
    der Corput's sequence).
    """
    bits = max(ranks - 1, 1).bit_length()
    return np.array(sorted(range(ranks), key=lambda rank: f"{rank:0{bits}b}"[::-1]))


class RankAllocator:
    """Allocates pages and decode rows on ranks that have sequences of their own, all with the same capacity.

    Attributes:
      capacity: Capacity of each rank.
      ranks: Number of ranks.
      prefill_rows: Rows of the prefill batch per rank.
      rows: The request in each row of the decode batch, or None, rank by rank.
      places: Place of each request on the instance.
      prefilling: Requests whose prompts are not prefilled yet, in order.
      load: Number of pages in use, which the scheduler balances.
    """

    def __init__(self, capacity: Capacity, ranks: int, prefill_rows: int = 1):
        self.capacity, self.ranks, self.prefill_rows = capacity, ranks, prefill_rows
        self.reset()

    def reset(self) -> None:
        """Forgets all requests."""
        ranks, rows = self.ranks, self.capacity.sequences
        self.pools = [PagePool(self.capacity.pages) for _ in range(ranks)]
        self.rows: list[Request | None] = [None] * (ranks * rows)
        self.places: dict[Request, Place] = {}
        self.prefilling: list[Request] = []
        self.load = 0
        self._used = np.zeros(ranks, np.int64)  # pages by rank
        self._free_rows = [list(range(rank * rows, (rank + 1) * rows)) for rank in range(ranks)]  # heaps
        self._full = np.zeros(ranks, np.int64)  # without a free row: more than any number of pages
        self._order = spread_order(ranks)

    def place(self, request: Request, tokens: int, decode: bool, reserve_pages: int = 0) -> bool:
        """Allocates pages for a request on the emptiest rank, and a row there if it will decode.

        Args:
          request: A request without a place on this instance.
          tokens: Number of tokens that it needs pages for.
          decode: True if it will decode.
          reserve_pages: Pages to keep free for each sequence that decodes on the rank, as these will grow.

        Returns:
          False, with nothing changed, if no rank has room.
        """
        need = pages_for(tokens, self.capacity.page_width)
        used = self._used + self._full if decode else self._used
        rank = int(self._order[used[self._order].argmin()])
        if self.pools[rank].free < need or (decode and not self._free_rows[rank]):
            return False
        running = self.capacity.sequences - len(self._free_rows[rank])
        if decode and self.pools[rank].free < need + reserve_pages * running:
            return False
        row = None
        if decode:
            row = heapq.heappop(self._free_rows[rank])
            self.rows[row] = request
            self._full[rank] = 0 if self._free_rows[rank] else self.capacity.pages + 1
        self.places[request] = Place(rank, self.pools[rank].take(need), row)
        self._count_pages(rank, need)
        return True

    def grow(self, request: Request, tokens: int) -> bool:
        """Allocates further pages for a placed request until it has them for `tokens` tokens.

        Returns:
          False, with nothing changed, if its rank does not have enough free pages.
        """
        place = self.places[request]
        missing = pages_for(tokens, self.capacity.page_width) - len(place.pages)
        if missing > self.pools[place.rank].free:
            return False
        if missing > 0:
            place.pages.extend(self.pools[place.rank].take(missing))
            self._count_pages(place.rank, missing)
        return True

    def release(self, request: Request) -> None:
        """Frees the pages and the row of a request."""
        place = self.places.pop(request)
        if request in self.prefilling:
            self.prefilling.remove(request)
        self.pools[place.rank].give_back(place.pages)
        self._count_pages(place.rank, -len(place.pages))
        if place.row is not None:
            self.rows[place.row] = None
            heapq.heappush(self._free_rows[place.rank], place.row)
            self._full[place.rank] = 0

    def _count_pages(self, rank: int, pages: int) -> None:
        self._used[rank] += pages
        self.load += pages

    @property
    def decodes(self) -> bool:
        """True if any sequence decodes here."""
        return any(r is not None and r.state is State.DECODE for r in self.rows)

    def next_pieces(self) -> list[list[Piece]]:
        """Returns the prompt chunks of the next prefill step, by batch row."""
        placed = ((request, self.places[request].rank) for request in self.prefilling)
        budget, width = self.capacity.max_num_batched_tokens, self.capacity.page_width
        return schedule(placed, self.ranks, self.prefill_rows, budget, width)

    def mark_prefilled(
        self, pieces: list[list[Piece]], kept: Collection[Request] | None = None
    ) -> list[tuple[Request, int, int]]:
        """Records that prompt chunks have run.

        Args:
          pieces: Chunks in each batch row.
          kept: Requests that still have the place that they had when the chunks were chosen; None: all.

        Returns:
          The requests whose prompts are complete, each with the batch row and the index there of its last
          piece.
        """
        completed = []
        for row, row_pieces in enumerate(pieces):
            for index, piece in enumerate(row_pieces):
                if kept is not None and piece.request not in kept:
                    continue
                piece.request.prefilled = piece.stop
                if piece.stop == len(piece.request.prefill_tokens):
                    self.prefilling.remove(piece.request)
                    completed.append((piece.request, row, index))
        return completed
