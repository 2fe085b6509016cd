"""The queue of requests that wait for a place, by priority and then in order of arrival; and its limits."""

from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass

from cmx_jax.errors import CmxError
from cmx_jax.serving.scheduling.request import Overloaded, Request


@dataclass(frozen=True, kw_only=True)
class QueueLimits:
    """Limits of the waiting queue; None is no limit.

    Attributes:
      max_num_queued_reqs: Number of requests that may wait for a place; further ones are refused.
      max_num_queued_tokens: Number of prompt tokens that may wait; further prompts are refused.
      queue_ttl_s: Seconds that a request waits for its first place before it fails.

    Raises:
      CmxError: A limit is not above zero.
    """

    max_num_queued_reqs: int | None = None
    max_num_queued_tokens: int | None = None
    queue_ttl_s: float | None = None

    def __post_init__(self) -> None:
        for name, limit in asdict(self).items():
            if limit is not None and not limit > 0:
                raise CmxError(f"{name} is {limit}, expected more than zero")

    def check(self, requests: int, tokens: int, waited_s: Callable[[], float]) -> None:
        """Checks that a queue of `requests` requests with `tokens` prompt tokens is within the limits.

        A client that is refused is told to retry after as long as the oldest request has waited, an estimate
        of the current queueing time.

        Args:
          requests: Number of waiting requests, with the new ones.
          tokens: Number of their prompt tokens, with those of the new ones.
          waited_s: Returns the seconds that the oldest request has waited.

        Raises:
          Overloaded: A limit is exceeded.
        """
        counts = {"max_num_queued_reqs": requests, "max_num_queued_tokens": tokens}
        for name, count in counts.items():
            limit = getattr(self, name)
            if limit is not None and count > limit:
                raise Overloaded(f"the queue is full ({name} {limit}), retry later", max(waited_s(), 1.0))


class Waiting:
    """A queue for each priority; the smallest number goes first, as in vLLM.

    Attributes:
      tokens: Number of tokens of all waiting requests that prefill has to run.
    """

    def __init__(self) -> None:
        self._queues: dict[int, deque[Request]] = {}
        self._order: list[int] = []  # priorities that have a queue
        self.clear()

    def clear(self) -> None:
        self._queues.clear()
        self._order.clear()
        self._count = self.tokens = 0

    def push(self, request: Request, front: bool = False) -> None:
        """Adds a request after the others of its priority, or before them with `front`."""
        queue = self._queues.get(request.priority)
        if queue is None:
            queue = self._queues[request.priority] = deque()
            self._order = sorted(self._queues)
        (queue.appendleft if front else queue.append)(request)
        self._count += 1
        self.tokens += len(request.prefill_tokens)

    def expired(self, arrived: float) -> list[Request]:
        """Returns the requests that came before the clock time `arrived` and never had a place."""
        return [r for r in self if r.arrived < arrived and not r.preemptions]

    def first(self) -> Request:
        """Returns the request whose turn it is."""
        return self._queues[self._order[0]][0]

    def pop(self) -> Request:
        """Removes the first request and returns it."""
        request = self._queues[self._order[0]].popleft()
        self._removed(request)
        return request

    def remove(self, request: Request) -> None:
        """Removes a request from anywhere in the queue."""
        self._queues[request.priority].remove(request)
        self._removed(request)

    def _removed(self, request: Request) -> None:
        self._count -= 1
        self.tokens -= len(request.prefill_tokens)
        if not self._queues[request.priority]:
            del self._queues[request.priority]
            self._order.remove(request.priority)

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[Request]:
        for priority in self._order:
            yield from self._queues[priority]
