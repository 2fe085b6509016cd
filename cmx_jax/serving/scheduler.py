"""Which request goes where: admission, moves to decode, and what is released when.

The policy is here once. `engine.py` runs the steps between with JAX, on the wall clock; `simulate/` lets
virtual time pass instead. Any request may go to any prefill instance and any decode rank: the least loaded is
taken (section 2: no affinity).
"""

from collections import deque
from collections.abc import Callable
from operator import attrgetter
from typing import Generic, TypeVar

from cmx_jax.errors import CmxError
from cmx_jax.serving.pages import pages_for
from cmx_jax.serving.ranks import Ranks
from cmx_jax.serving.request import Request, State

R = TypeVar("R", bound=Ranks)
_load = attrgetter("load")


class Scheduler(Generic[R]):
    """Prefill and decode instances, and the requests on their way through them.

    An instance may be in both lists; a request that is prefilled there stays for decode.

    Attributes:
      waiting: requests without a place, in order.
      transfers: prefilled requests and where their pages lie, in order.
      clock: seconds; it stamps the requests.
    """

    def __init__(self, prefill: list[R], decoders: list[R], clock: Callable[[], float]):
        self.prefill, self.decoders, self.clock = prefill, decoders, clock
        self.waiting: deque[Request] = deque()
        self.transfers: deque[tuple[R, Request]] = deque()
        self._both = frozenset(prefill) & frozenset(decoders)
        rooms = [(i.capacity, True) for i in decoders]  # and whether all of a request's tokens come there
        rooms += [(i.capacity, False) for i in prefill if i not in self._both]
        self._rooms = tuple(dict.fromkeys(rooms))

    def _queue(self, request: Request) -> None:
        """Lets a request wait.

        Raises:
          CmxError: a cache that it must go through is smaller than it is.
        """
        for room, whole in self._rooms:
            if (
                pages_for(request.cached_tokens if whole else len(request.prompt), room.page_width)
                > room.pages
            ):
                raise CmxError(
                    f"a prompt of {len(request.prompt)} tokens and max_tokens {request.params.max_tokens} "
                    f"exceed a rank's cache of {room.pages} pages of {room.page_width} tokens"
                )
        self.waiting.append(request)

    def _admit(self) -> list[tuple[R, Request]]:
        """Places waiting requests in order, until one finds no room; returns where they went."""
        placed = []
        while self.waiting:
            request = self.waiting[0]
            for instance in sorted(self.prefill, key=_load):
                stays = instance in self._both
                tokens = request.cached_tokens if stays else len(request.prompt)
                if instance.place(request, tokens, decode=stays):
                    instance.prefilling.append(self.waiting.popleft())
                    request.to(State.PREFILL)
                    placed.append((instance, request))
                    break
            else:
                break
        return placed

    def _prefilled(self, at: R, request: Request, last: bool) -> None:
        """Sends a request on that has its first token, if that is not its last."""
        request.first_token = self.clock()
        if last:
            self._finish(at, request)
        elif at in self._both:
            request.to(State.DECODE)
        else:
            request.to(State.TRANSFER)
            self.transfers.append((at, request))

    def _receive(self) -> list[tuple[R, R, Request]]:
        """Places prefilled requests on decode ranks, in order, as far as there is room.

        Returns:
          source, target, request: pages that are to be moved.
        """
        moves: list[tuple[R, R, Request]] = []
        while self.transfers:
            source, request = self.transfers[0]
            for target in sorted(self.decoders, key=_load):
                if target.place(request, request.cached_tokens, decode=True):
                    self.transfers.popleft()
                    moves.append((source, target, request))
                    break
            else:
                break
        return moves

    @staticmethod
    def _moved(source: R, request: Request) -> None:
        """Frees the pages that were moved."""
        source.release(request)
        request.to(State.DECODE)

    def _finish(self, at: R, request: Request) -> None:
        at.release(request)
        request.finished = self.clock()
        request.to(State.FINISHED)
