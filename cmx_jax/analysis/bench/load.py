"""Requests sent when they are due, so many at once as is allowed."""

import asyncio
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from time import perf_counter

from cmx_jax.analysis.bench.client import Client, Outcome
from cmx_jax.analysis.bench.prompts import Ask
from cmx_jax.errors import CmxError


class Load:
    """A measurement. Interrupted, it keeps the outcomes there are; what was still running is in none.

    Args:
      asks: requests, by time.
      warmups: sent before, and awaited; they count nowhere.
      max_concurrency: requests that run at once, None: any number; waiting here is in no latency.
      tell: is told how far it is.

    Attributes:
      outcomes: by the request's number.
      began: second of `time.perf_counter` at which the measurement began; None before.
      duration: seconds that it took.

    Raises:
      CmxError: `max_concurrency` is below 1.
    """

    def __init__(
        self,
        asks: Sequence[Ask],
        warmups: Sequence[Ask] = (),
        max_concurrency: int | None = None,
        tell: Callable[[str], None] = lambda _: None,
    ):
        if max_concurrency is not None and max_concurrency < 1:
            raise CmxError(f"max_concurrency is {max_concurrency}, expected at least 1")
        self.asks, self._warmups, self._tell = asks, warmups, tell
        self._slots = nullcontext() if max_concurrency is None else asyncio.Semaphore(max_concurrency)
        self.outcomes: dict[int, Outcome] = {}
        self.began: float | None = None
        self.duration, self._failed = 0.0, 0

    async def run(self, client: Client) -> None:
        """Sends everything and waits for it.

        Raises:
          CmxError: a warm-up failed.
        """
        async with client:
            if self._warmups:
                self._tell(f"{len(self._warmups)} warm-ups")
                for outcome in await asyncio.gather(*(self._stream(client, ask) for ask in self._warmups)):
                    if outcome.error:
                        raise CmxError(f"a warm-up failed ({outcome.error}): see what the server says")
            self.began = perf_counter()
            try:
                await self._send(client, self.began)
            finally:
                self.duration = perf_counter() - self.began

    async def _send(self, client: Client, began: float) -> None:
        async with asyncio.TaskGroup() as group:
            for number, ask in enumerate(self.asks):
                await asyncio.sleep(began + ask.time - perf_counter())
                group.create_task(self._one(client, number, ask))

    async def _one(self, client: Client, number: int, ask: Ask) -> None:
        self.outcomes[number] = outcome = await self._stream(client, ask)
        self._failed += bool(outcome.error)
        failed = f", {self._failed} failed" if self._failed else ""
        self._tell(f"{len(self.outcomes)}/{len(self.asks)} requests{failed}")

    async def _stream(self, client: Client, ask: Ask) -> Outcome:
        async with self._slots:
            return await client.stream(ask)


def measure(load: Load, client: Client) -> bool:
    """Runs a load; whether it came to its end, or was interrupted while it was measured.

    Raises:
      CmxError: as `Load.run`.
      KeyboardInterrupt: nothing was measured yet.
    """
    try:
        asyncio.run(load.run(client))
    except KeyboardInterrupt:
        if load.began is None:
            raise
        return False
    return True
