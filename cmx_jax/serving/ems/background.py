"""Work that nobody waits for: one thread, and a bounded queue before it."""

import threading
import time
from collections import deque
from collections.abc import Callable


class Background:
    """Runs what it is given, in that order.

    * The queue is bounded: what does not fit is refused, and the caller goes on.
    * What raises ends neither the thread nor the program; `error` has the last one.
    """

    def __init__(self, limit: int):
        self._limit = limit
        self._jobs: deque[Callable[[], object]] = deque()
        self._waiting = 0  # queued, or running now
        self._changed = threading.Condition()
        self._ended = False
        self.error = ""
        self._thread = threading.Thread(target=self._work, name="ems-put", daemon=True)
        self._thread.start()

    @property
    def waiting(self) -> int:
        """Jobs that are not done."""
        return self._waiting

    def submit(self, job: Callable[[], object]) -> bool:
        """Whether there was room for it."""
        with self._changed:
            if self._ended or len(self._jobs) >= self._limit:
                return False
            self._jobs.append(job)
            self._waiting += 1
            self._changed.notify_all()
            return True

    def flush(self, timeout: float) -> bool:
        """Waits until all is done; whether it was, within `timeout` seconds."""
        with self._changed:
            return self._changed.wait_for(lambda: not self._waiting, timeout)

    def close(self, timeout: float) -> int:
        """Ends the thread when all is done, or after `timeout` seconds; the jobs that were given up."""
        deadline = time.monotonic() + timeout
        self.flush(timeout)
        with self._changed:
            given_up = len(self._jobs)
            self._jobs.clear()
            self._waiting -= given_up
            self._ended = True
            self._changed.notify_all()
        self._thread.join(max(0.0, deadline - time.monotonic()))
        return given_up

    def _work(self) -> None:
        while (job := self._next()) is not None:
            try:
                job()
            except Exception as error:  # of one job; the next ones are done all the same
                self.error = f"{type(error).__name__}: {error}"
            with self._changed:
                self._waiting -= 1
                self._changed.notify_all()

    def _next(self) -> Callable[[], object] | None:
        with self._changed:
            self._changed.wait_for(lambda: self._jobs or self._ended)
            return self._jobs.popleft() if self._jobs else None
