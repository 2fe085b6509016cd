"""Which request goes where: admission, moves to decode, preemption, and what is released when.

The policy is here once. `engine.py` runs the steps between with JAX, on the wall clock; `simulate/` lets
virtual time pass instead. Any request may go to any prefill instance and any decode rank: the least loaded is
taken (section 2: no affinity).
"""

from collections import deque
from collections.abc import Callable
from operator import attrgetter
from typing import Any, Generic, TypeVar

from cmx_jax.errors import CmxError
from cmx_jax.serving.scheduling.allocator import RankAllocator
from cmx_jax.serving.scheduling.pages import pages_for
from cmx_jax.serving.scheduling.request import Request, State
from cmx_jax.serving.scheduling.waiting import Waiting

R = TypeVar("R", bound=RankAllocator)
_load = attrgetter("load")


class Scheduler(Generic[R]):
    """Prefill and decode instances, and the requests on their way through them.

    An instance may be in both lists; a request that is prefilled there stays for decode.

    Attributes:
      waiting: requests without a place.
      transfers: prefilled requests and where their pages lie, in order.
      clock: seconds; it stamps the requests.
      ahead: tokens beyond those that it has, for which a sequence is given pages where it decodes; they grow
        with it, and where none is left some sequence is preempted. None: pages for all that may come, at
        once.
      leaving: instances that get no further requests.
      preempted: how often a request was.
    """

    ahead: int | None = None

    def __init__(self, prefill: list[R], decoders: list[R], clock: Callable[[], float]):
        self.clock = clock
        self.waiting = Waiting()
        self.transfers: deque[tuple[Any, Request]] = deque()  # from an instance, or from another process
        self.leaving: set[R] = set()
        self.preempted = 0
        self._carve(prefill, decoders)

    def _carve(self, prefill: list[R], decoders: list[R]) -> None:
        """These are the instances from now on."""
        self.prefill, self.decoders = prefill, decoders
        self._both = frozenset(prefill) & frozenset(decoders)
        rooms = [(i.capacity, True) for i in decoders]  # and whether all of a request's tokens come there
        rooms += [(i.capacity, False) for i in prefill if i not in self._both]
        self._rooms = tuple(dict.fromkeys(rooms))
        self._longest = max((i.capacity.pages * i.capacity.page_width for i in prefill), default=None)

    @property
    def instances(self) -> list[R]:
        """All of them, each once."""
        return list(dict.fromkeys([*self.prefill, *self.decoders]))

    def _queue(self, request: Request) -> None:
        """Lets a request wait.

        Raises:
          CmxError: as `_check_rooms`.
        """
        self._check_rooms(request)
        self.waiting.push(request)

    def _check_rooms(self, request: Request) -> None:
        """Whether a request fits where it must go.

        Raises:
          CmxError: a cache that it must go through is smaller than it is.
        """
        for room, whole in self._rooms:
            if (
                pages_for(request.max_kv_tokens if whole else len(request.prompt), room.page_width)
                > room.pages
            ):
                raise CmxError(
                    f"a prompt of {len(request.prompt)} tokens and max_tokens {request.params.max_tokens} "
                    f"exceed a rank's cache of {room.pages} pages of {room.page_width} tokens"
                )

    def _room(self, request: Request) -> int:
        """Tokens for which a request needs pages where it decodes."""
        if self.ahead is None or not self._resumable(request.max_kv_tokens):
            return request.max_kv_tokens
        return min(len(request.prompt) + len(request.tokens) + self.ahead, request.max_kv_tokens)

    def _resumable(self, tokens: int) -> bool:
        """Whether a request could be prefilled again with so many. Only one that could with all that it may
        get grows, and is preempted. Without prefill instances whoever sent it sees to that."""
        return self._longest is None or tokens <= self._longest

    def _admit(self) -> list[tuple[R, Request]]:
        """Places waiting requests in order, until one finds no room; returns where they went."""
        placed = []
        spare = int(self.ahead is not None)
        while self.waiting:
            request = self.waiting.first()
            for instance in sorted(self.prefill, key=_load):
                stays = instance in self._both
                tokens = (
                    max(self._room(request), len(request.prefill_tokens))
                    if stays
                    else len(request.prefill_tokens)
                )
                if instance not in self.leaving and instance.place(request, tokens, stays, spare):
                    instance.prefilling.append(self.waiting.pop())
                    request.to(State.PREFILL)
                    placed.append((instance, request))
                    break
            else:
                break
        return placed

    def _prefilled(self, at: R, request: Request, last: bool) -> None:
        """Sends a request on that has its first token, if that is not its last."""
        if request.first_token is None:
            request.first_token = self.clock()
        if last:
            self._finish(at, request)
        elif at in self._both:
            request.to(State.DECODE)
        else:
            request.to(State.TRANSFER)
            self.transfers.append((at, request))

    def _receive(self) -> list[tuple[Any, R, Request]]:
        """Places prefilled requests on decode ranks, in order, as far as there is room.

        Returns:
          source, target, request: pages that are to be moved.
        """
        moves: list[tuple[Any, R, Request]] = []
        spare = int(self.ahead is not None)
        while self.transfers:
            source, request = self.transfers[0]
            for target in sorted(self.decoders, key=_load):
                if target not in self.leaving and target.place(request, self._room(request), True, spare):
                    self.transfers.popleft()
                    moves.append((source, target, request))
                    break
            else:
                break
        return moves

    @staticmethod
    def _moved(source: Any, request: Request) -> None:
        """Frees the pages that were moved."""
        source.release(request)
        request.to(State.DECODE)

    def _grow(self, at: R) -> list[Request]:
        """Gives everyone who decodes here pages for the next step, the most urgent first. Who finds none left
        on its rank takes the place of the least urgent one there, which goes back to the queue, or, where
        there is none, is finished and returned."""
        here, over = sorted((r for r in at.rows if r is not None), key=_urgency), []
        for request in here:
            if request.state is not State.DECODE:
                continue
            while request in at.places and not at.grow(request, self._room(request)):
                rank = at.places[request].rank
                least = (
                    r
                    for r in reversed(here)
                    if r in at.places and at.places[r].rank == rank and self._resumable(r.max_kv_tokens)
                )
                victim = next(least)
                self._preempt(at, victim)
                over += [victim] * (victim.state is State.FINISHED)
        return over

    def _preempt(self, at: R, request: Request) -> None:
        """Takes a request's pages; it waits again, before others of its priority, and loses no token."""
        at.release(request)
        self.preempted += 1
        if self._resumable(len(request.prompt) + len(request.tokens)):
            self._requeue(request)
        else:  # its instance leaves
            request.finish_reason = "error"
            request.error = (
                "its instance left, and no prefill instance has room for the prompt and its answer"
            )
            self._finish(None, request)

    def _requeue(self, request: Request) -> None:
        request.requeue()
        self.waiting.push(request, front=True)

    def cancel(self, request: Request, reason: str = "abort", error: str | None = None) -> None:
        """Ends a request, wherever it is; what it holds is free at once. One that is finished stays so."""
        if request.state is State.FINISHED:
            return
        request.finish_reason, request.error = reason, error
        at = next((i for i in self.instances if request in i.places), None)
        if request.state is State.WAITING:
            self.waiting.remove(request)
        elif request.state is State.TRANSFER:
            at = next(source for source, r in self.transfers if r is request)
            self.transfers.remove((at, request))
        self._finish(at, request)

    def _finish(self, at: R | None, request: Request) -> None:
        if at is not None:
            at.release(request)
        request.finished = self.clock()
        request.to(State.FINISHED)


def _urgency(request: Request) -> tuple[int, float, int]:
    return request.priority, request.arrived, request.id
