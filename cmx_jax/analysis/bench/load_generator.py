"""Load generator: sends requests at their times, up to a limit of concurrent ones."""

import asyncio
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from time import perf_counter

from cmx_jax.analysis.bench.client import Client, RequestOutcome
from cmx_jax.analysis.bench.prompts import BenchRequest
from cmx_jax.errors import CmxError


class LoadGenerator:
    """Sends requests and collects their outcomes. If interrupted, it keeps those of requests that ended.

    Args:
      requests: Requests in order of time.
      warmups: Requests that are sent before and awaited; they are not measured.
      max_concurrency: Maximum number of concurrent requests; None: no limit. Latencies do not include the
        time that a request waits for it.
      tell: Callback for messages about the progress.

    Attributes:
      requests: The requests.
      outcomes: Outcomes by the request's number.
      began: Beginning of the measurement in seconds of `time.perf_counter`; None before.
      duration: Seconds of the measurement.

    Raises:
      CmxError: `max_concurrency` is below 1.
    """

    def __init__(
        self,
        requests: Sequence[BenchRequest],
        warmups: Sequence[BenchRequest] = (),
        max_concurrency: int | None = None,
        tell: Callable[[str], None] = lambda _: None,
    ):
        if max_concurrency is not None and max_concurrency < 1:
            raise CmxError(f"max_concurrency is {max_concurrency}, expected at least 1")
        self.requests, self._warmups, self._tell = requests, warmups, tell
        self._slots = nullcontext() if max_concurrency is None else asyncio.Semaphore(max_concurrency)
        self.outcomes: dict[int, RequestOutcome] = {}
        self.began: float | None = None
        self.duration, self._failed = 0.0, 0

    async def run(self, client: Client) -> None:
        """Sends all requests and waits for their answers.

        Raises:
          CmxError: A warm-up failed.
        """
        async with client:
            if self._warmups:
                self._tell(f"{len(self._warmups)} warm-ups")
                streams = (self._stream(client, request) for request in self._warmups)
                for outcome in await asyncio.gather(*streams):
                    if outcome.error:
                        raise CmxError(f"a warm-up failed ({outcome.error}): see what the server says")
            self.began = perf_counter()
            try:
                await self._send(client, self.began)
            finally:
                self.duration = perf_counter() - self.began

    async def _send(self, client: Client, began: float) -> None:
        async with asyncio.TaskGroup() as group:
            for number, request in enumerate(self.requests):
                await asyncio.sleep(began + request.time - perf_counter())
                group.create_task(self._measure(client, number, request))

    async def _measure(self, client: Client, number: int, request: BenchRequest) -> None:
        self.outcomes[number] = outcome = await self._stream(client, request)
        self._failed += bool(outcome.error)
        failed = f", {self._failed} failed" if self._failed else ""
        self._tell(f"{len(self.outcomes)}/{len(self.requests)} requests{failed}")

    async def _stream(self, client: Client, request: BenchRequest) -> RequestOutcome:
        async with self._slots:
            return await client.stream(request)


def measure(load: LoadGenerator, client: Client) -> bool:
    """Runs a load generator.

    Returns:
      True if all requests ended, False if the measurement was interrupted.

    Raises:
      CmxError: A warm-up failed.
      KeyboardInterrupt: The interrupt came before the measurement began.
    """
    try:
        asyncio.run(load.run(client))
    except KeyboardInterrupt:
        if load.began is None:
            raise
        return False
    return True
