"""Background work: one thread with a bounded queue."""

import threading
import time
from collections import deque
from collections.abc import Callable


class Background:
    """Runs jobs in the order in which they were submitted.

    * The queue is bounded: a job that does not fit is refused, and the caller continues.
    * A job that raises ends neither the thread nor the program.

    Attributes:
      error: Type and text of the last exception of a job, or "".
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
        """Number of jobs that are not done."""
        return self._waiting

    def submit(self, job: Callable[[], object]) -> bool:
        """Queues a job. Returns whether there was room for it."""
        with self._changed:
            if self._ended or len(self._jobs) >= self._limit:
                return False
            self._jobs.append(job)
            self._waiting += 1
            self._changed.notify_all()
            return True

    def flush(self, timeout: float) -> bool:
        """Waits until all jobs are done. Returns False if that takes more than `timeout` seconds."""
        with self._changed:
            return self._changed.wait_for(lambda: not self._waiting, timeout)

    def close(self, timeout: float) -> int:
        """Ends the thread after all jobs, or after `timeout` seconds. Returns the number of dropped jobs."""
        deadline = time.monotonic() + timeout
        self.flush(timeout)
        with self._changed:
            dropped = len(self._jobs)
            self._jobs.clear()
            self._waiting -= dropped
            self._ended = True
            self._changed.notify_all()
        self._thread.join(max(0.0, deadline - time.monotonic()))
        return dropped

    def _work(self) -> None:
        while (job := self._next()) is not None:
            try:
                job()
            except Exception as error:  # one job failed; the others still run
                self.error = f"{type(error).__name__}: {error}"
            with self._changed:
                self._waiting -= 1
                self._changed.notify_all()

    def _next(self) -> Callable[[], object] | None:
        with self._changed:
            self._changed.wait_for(lambda: self._jobs or self._ended)
            return self._jobs.popleft() if self._jobs else None
