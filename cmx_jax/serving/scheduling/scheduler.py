"""The scheduling policy: admission, moves from prefill to decode, preemption, and what each of them frees.

The engine (`engine.py`) has a scheduler and runs the steps between its decisions with JAX, on the wall clock;
the simulator (`analysis/simulate/`) has one and lets virtual time pass instead. Any request may go to any
prefill instance and any decode rank: the least loaded one is taken (section 2: no affinity).
"""

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from operator import attrgetter
from typing import Any, Generic, Protocol, TypeVar, runtime_checkable

from cmx_jax.errors import CmxError
from cmx_jax.serving.scheduling.allocator import Capacity, RankAllocator
from cmx_jax.serving.scheduling.pages import pages_for
from cmx_jax.serving.scheduling.request import Request, State
from cmx_jax.serving.scheduling.waiting import Waiting


@runtime_checkable
class Schedulable(Protocol):
    """An instance as the scheduler sees it.

    Attributes:
      name: Name of the instance.
      allocator: Rows and pages of its ranks.
    """

    name: str
    allocator: RankAllocator

    def release(self, request: Request) -> None:
        """Frees the pages and the row of a request."""
        ...


R = TypeVar("R", bound=Schedulable)
OnChange = Callable[[Request, State, Any], None]
"""Gets a request, the state that it has entered, and the instance that has its pages, or None."""
_load = attrgetter("allocator.load")


@dataclass(frozen=True)
class CapacityLimit:
    """A cache that every request must fit into.

    Attributes:
      capacity: Capacity of one rank.
      with_answer: True if a request's generated tokens are cached there too; False for its prompt alone.
    """

    capacity: Capacity
    with_answer: bool


class Scheduler(Generic[R]):
    """Decides which requests run on which prefill and decode instances.

    An instance may be in both lists; a request that is prefilled there stays for decode. Without prefill
    instances a preempted request ends, with the finish reason `preempted`: its sender prefills it again.

    Attributes:
      prefill: Prefill instances.
      decoders: Decode instances.
      both: Instances that prefill and decode.
      waiting: Requests without a place.
      transfers: Prefilled requests in order, each with the source of its pages: an instance, or a stand-in
        for another process.
      clock: Returns the time in seconds; it stamps the requests.
      lookahead_tokens: Tokens beyond its current length for which a decoding sequence has pages. The pages
        grow with it, and when none is left a sequence is preempted. None: a sequence gets pages for its
        maximum length at once.
      leaving: Instances that get no further requests.
      preempted: Number of preemptions so far.
    """

    def __init__(
        self,
        prefill: list[R],
        decoders: list[R],
        clock: Callable[[], float],
        lookahead_tokens: int | None = None,
    ):
        self.clock, self.lookahead_tokens = clock, lookahead_tokens
        # kept free for each sequence that decodes on a rank, when another one is placed there
        self._reserve_pages = int(lookahead_tokens is not None)
        self.waiting = Waiting()
        self.transfers: deque[tuple[Any, Request]] = deque()
        self.leaving: set[R] = set()
        self.preempted = 0
        self._subscribers: tuple[OnChange, ...] = ()
        self.set_instances(prefill, decoders)

    def subscribe(self, on_change: OnChange) -> None:
        """Calls a function after each change of a request's state from now on."""
        self._subscribers += (on_change,)

    def _changed(self, request: Request, instance: Any) -> None:
        for on_change in self._subscribers:
            on_change(request, request.state, instance)

    def set_instances(self, prefill: list[R], decoders: list[R]) -> None:
        """Schedules onto these instances from now on."""
        self.prefill, self.decoders = prefill, decoders
        self.both = frozenset(prefill) & frozenset(decoders)
        limits = [CapacityLimit(i.allocator.capacity, with_answer=True) for i in decoders]
        limits += [
            CapacityLimit(i.allocator.capacity, with_answer=False) for i in prefill if i not in self.both
        ]
        self._capacities = tuple(dict.fromkeys(limits))
        capacities = [i.allocator.capacity for i in prefill]
        self._longest = max((c.pages * c.page_width for c in capacities), default=None)

    @property
    def instances(self) -> list[R]:
        """All instances, each once."""
        return list(dict.fromkeys([*self.prefill, *self.decoders]))

    # into the queue

    def enqueue(self, request: Request) -> None:
        """Appends a request to the waiting queue.

        Raises:
          CmxError: The request exceeds the cache of a rank.
        """
        self._check_capacities(request)
        self.waiting.push(request)
        self._changed(request, None)

    def enqueue_transfer(self, source: Any, request: Request) -> None:
        """Appends a request that was prefilled elsewhere; its pages come from `source`.

        Raises:
          CmxError: The request exceeds the cache of a rank.
        """
        self._check_capacities(request)
        self.transfers.append((source, request))
        self._changed(request, None)

    def _check_capacities(self, request: Request) -> None:
        for limit in self._capacities:
            capacity = limit.capacity
            tokens = request.max_kv_tokens if limit.with_answer else len(request.prompt)
            if pages_for(tokens, capacity.page_width) > capacity.pages:
                raise CmxError(
                    f"a prompt of {len(request.prompt)} tokens and max_tokens {request.params.max_tokens} "
                    f"exceed a rank's cache of {capacity.pages} pages of {capacity.page_width} tokens"
                )

    def _tokens_to_reserve(self, request: Request) -> int:
        """Number of tokens for which a request needs pages on its decode rank."""
        if self.lookahead_tokens is None or not self._resumable(request.max_kv_tokens):
            return request.max_kv_tokens
        return min(len(request.prompt) + len(request.tokens) + self.lookahead_tokens, request.max_kv_tokens)

    def _resumable(self, tokens: int) -> bool:
        """Returns whether a prompt of `tokens` tokens fits a prefill instance.

        Only a request that fits at its maximum length grows and may be preempted, since a preempted request
        is prefilled again. Without prefill instances that is up to its sender.
        """
        return self._longest is None or tokens <= self._longest

    # from state to state

    def admit(self) -> list[tuple[R, Request]]:
        """Places waiting requests in order, until one does not fit; returns each with its instance."""
        placed = []
        while self.waiting:
            request = self.waiting.first()
            for instance in sorted(self.prefill, key=_load):
                stays = instance in self.both
                tokens = max(self._tokens_to_reserve(request) if stays else 0, len(request.prefill_tokens))
                allocator = instance.allocator
                if instance not in self.leaving and allocator.place(
                    request, tokens, stays, self._reserve_pages
                ):
                    allocator.prefilling.append(self.waiting.pop())
                    request.to(State.PREFILL)
                    self._changed(request, instance)
                    placed.append((instance, request))
                    break
            else:
                break
        return placed

    def finish_prefill(self, instance: R, request: Request, last: bool) -> None:
        """Sends a request on that has its first token, or finishes it if that token was its last."""
        if request.first_token is None:
            request.first_token = self.clock()
        if last:
            self.finish(instance, request)
            return
        if instance in self.both:
            request.to(State.DECODE)
        else:
            request.to(State.TRANSFER)
            self.transfers.append((instance, request))
        self._changed(request, instance)

    def receive(self) -> list[tuple[Any, R, Request]]:
        """Places prefilled requests on decode ranks, in order, until one does not fit.

        Returns:
          Source, target and request of each move of pages that is due.
        """
        moves: list[tuple[Any, R, Request]] = []
        while self.transfers:
            source, request = self.transfers[0]
            tokens = self._tokens_to_reserve(request)
            for target in sorted(self.decoders, key=_load):
                if target not in self.leaving and target.allocator.place(
                    request, tokens, True, self._reserve_pages
                ):
                    self.transfers.popleft()
                    moves.append((source, target, request))
                    break
            else:
                break
        return moves

    def finish_move(self, source: Any, target: R, request: Request) -> None:
        """Frees the pages at the source of a move; the request decodes at its target now."""
        source.release(request)
        request.to(State.DECODE)
        self._changed(request, target)

    def grow(self, instance: R) -> list[Request]:
        """Allocates pages for the next decode step of an instance, the most urgent request first.

        If a rank has no page left, its least urgent request is preempted. It goes back to the queue, or is
        finished if it cannot be prefilled again.

        Returns:
          The preempted requests that were finished.
        """
        allocator, finished = instance.allocator, []
        requests = sorted((r for r in allocator.rows if r is not None), key=_urgency)
        for request in requests:
            if request.state is not State.DECODE:
                continue
            while request in allocator.places and not allocator.grow(
                request, self._tokens_to_reserve(request)
            ):
                rank = allocator.places[request].rank
                victim = next(
                    r
                    for r in reversed(requests)
                    if r in allocator.places
                    and allocator.places[r].rank == rank
                    and self._resumable(r.max_kv_tokens)
                )
                self.preempt(instance, victim)
                finished += [victim] * (victim.state is State.FINISHED)
        return finished

    def preempt(self, instance: R, request: Request) -> None:
        """Frees a request's pages; it waits again, before others of its priority, and loses no token."""
        instance.release(request)
        self.preempted += 1
        if not self.prefill:
            request.finish_reason = "preempted"
            self.finish(None, request)
        elif self._resumable(len(request.prompt) + len(request.tokens)):
            request.requeue()
            self.waiting.push(request, front=True)
            self._changed(request, None)
        else:  # its instance leaves
            request.finish_reason = "error"
            request.error = (
                "its instance left, and no prefill instance has room for the prompt and its answer"
            )
            self.finish(None, request)

    def cancel(self, request: Request, reason: str = "abort", error: str | None = None) -> None:
        """Ends a request in any state and frees what it holds at once; a finished one stays as it is."""
        if request.state is State.FINISHED:
            return
        request.finish_reason, request.error = reason, error
        source = next((i for i in self.instances if request in i.allocator.places), None)
        if request.state is State.WAITING:
            self.waiting.remove(request)
        elif request.state is State.TRANSFER:
            source = next(source for source, r in self.transfers if r is request)
            self.transfers.remove((source, request))
        self.finish(source, request)

    def finish(self, source: Any, request: Request) -> None:
        """Ends a request and frees its pages at `source`: an instance, or None if it has none."""
        if source is not None:
            source.release(request)
        request.finished = self.clock()
        request.to(State.FINISHED)
        self._changed(request, None)


def _urgency(request: Request) -> tuple[int, float, int]:
    return request.priority, request.arrived, request.id
