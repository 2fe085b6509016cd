"""Requests that wait for a place: by priority, then in the order in which they came; and how many may."""

from collections import deque
from collections.abc import Callable, Iterator, Mapping

from cmx_jax.errors import CmxError
from cmx_jax.serving.scheduling.request import Overloaded, Request


def check_limits(**limits: float | None) -> None:
    """Whether limits let anything in; None is no limit.

    Raises:
      CmxError: one is not above zero.
    """
    for name, limit in limits.items():
        if limit is not None and not limit > 0:
            raise CmxError(f"{name} is {limit}, expected more than zero")


def check_queue(counts: Mapping[str, tuple[int | None, int]], waited_s: Callable[[], float]) -> None:
    """Whether something more may wait. Who is told to come again is told to do so after as long as the first
    of those who wait has waited: that is what the queue takes at present.

    Args:
      counts: by the limit's name, the limit and what there would be.
      waited_s: seconds that the first one has waited.

    Raises:
      Overloaded: it is too much.
    """
    for name, (limit, count) in counts.items():
        if limit is not None and count > limit:
            raise Overloaded(f"the queue is full ({name} {limit}), come again later", max(waited_s(), 1.0))


class Waiting:
    """A queue for each priority; the smallest number goes first, as in vLLM.

    Attributes:
      tokens: of all inputs here.
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
        """Puts a request behind the others of its priority, or before them."""
        queue = self._queues.get(request.priority)
        if queue is None:
            queue = self._queues[request.priority] = deque()
            self._order = sorted(self._queues)
        (queue.appendleft if front else queue.append)(request)
        self._count += 1
        self.tokens += len(request.prefill_tokens)

    def first(self) -> Request:
        """Whose turn it is."""
        return self._queues[self._order[0]][0]

    def pop(self) -> Request:
        """Takes the first one out."""
        request = self._queues[self._order[0]].popleft()
        self._took(request)
        return request

    def remove(self, request: Request) -> None:
        """Takes a certain one out."""
        self._queues[request.priority].remove(request)
        self._took(request)

    def _took(self, request: Request) -> None:
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
