"""An engine that serves an event loop: one thread owns it, and all others send calls to that thread.

    event loop                                   engine thread
    Service.generate --- a call, and it waits -> between two steps: Engine.submit
    Generation       <-- all chunks of a step -- Engine.step, while there is work; else it sleeps
    Generation.close --- a call ---------------> between two steps: Engine.cancel

A step hands over its chunks as one batch and waits for nothing: the event loop turns tokens into text. A step
that fails ends every request with an error, the engine forgets them, and the next request is served.
"""

import asyncio
import concurrent.futures
import contextlib
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

from cmx_jax.serving.deploy.site import NpuRange
from cmx_jax.serving.engine.engine import Engine
from cmx_jax.serving.engine.timeline import TraceEvent
from cmx_jax.serving.executor.scoring import batches, prompt_logprobs
from cmx_jax.serving.kv.prefix_cache import PrefixCacheStats
from cmx_jax.serving.scheduling.request import Request, SamplingParams, TokenLogprob
from cmx_jax.serving.service.counters import EngineCounters, InstanceLoad, WorkerLoad
from cmx_jax.serving.service.frontend import Unavailable
from cmx_jax.serving.service.generation import ActiveRequest, Chunk, Generation, Interrupted, StepFailed

T = TypeVar("T")
log = logging.getLogger(__name__)


class Service:
    """Serves an engine on a thread of its own.

    Attributes:
      engine: The engine, which that thread owns; other threads may read its counters only.
      live: Requests that are not finished, as the engine's thread has them.
      draining: True while new requests are refused.
      broken: Reason why no request can be served any more, or None.
      watchers: Functions that get each chunk, on the event loop.
      busy_s: Seconds with work, in steps and between them. The engine's overhead is this less its `step_s`.
    """

    def __init__(self, engine: Engine):
        self.engine = engine
        self.live: dict[Request, ActiveRequest] = {}
        self.draining = False
        self.broken: str | None = None
        self.watchers: list[Callable[[Chunk], None]] = []
        self.busy_s = 0.0
        self._calls: deque[tuple[concurrent.futures.Future[Any], Callable[[], Any]]] = deque()
        self._wakeup = threading.Condition()
        self._stopping = False
        self._thread = threading.Thread(target=self._serve, name="engine", daemon=True)

    async def start(self) -> None:
        """Starts the thread; chunks come to the running event loop."""
        self._loop = asyncio.get_running_loop()
        self._thread.start()

    async def generate(
        self,
        requests: Sequence[tuple[list[int], SamplingParams]],
        *,
        priority: int = 0,
        namespace: str = "",
    ) -> Generation:
        """Submits prompts of token ids, all or none.

        Args:
          requests: Token ids of each prompt, and its sampling parameters.
          priority: Priority of the requests; smaller numbers go first.
          namespace: Namespace of the caching pool.

        Raises:
          Unavailable: No request is taken now.
          Overloaded: A queue is full.
          CmxError: One of them cannot be served.
        """
        submit = self.engine.submit
        return await self.submit_all(
            *(
                lambda prompt=prompt, params=params: submit(
                    prompt, params, priority=priority, namespace=namespace
                )
                for prompt, params in requests
            )
        )

    async def submit_all(self, *submit: Callable[[], Request], already_sent: int = 0) -> Generation:
        """Submits requests to the engine, all or none, and returns the generation of their tokens.

        Args:
          submit: Functions that each submit one request to the engine, on the engine's thread.
          already_sent: Number of tokens of each request that the client has already.

        Raises:
          Unavailable: No request is taken now.
          CmxError: One of them cannot be served.
        """
        if self.draining:
            raise Unavailable("the server is shutting down: ask again later, or another one")
        generation = Generation(len(submit), self.cancel)
        try:
            await self.call(lambda: self._submit(generation, submit, already_sent))
        except asyncio.CancelledError:
            generation.close()  # the call may have run
            raise
        return generation

    async def score(self, prompts: Sequence[Sequence[int]], top: int) -> list[list[TokenLogprob | None]]:
        """Returns `prompt_logprobs`, computed a batch at a time between the engine's steps.

        Raises:
          Unavailable: The engine is broken, or the service has stopped.
          CmxError: A prompt exceeds the model's context.
        """
        instance = self.engine.instances[0]
        results: dict[int, list[TokenLogprob | None]] = {}
        for rows in batches(instance, [len(prompt) for prompt in prompts]):
            batch = [prompts[row] for row in rows]
            scores = await self.call(lambda batch=batch: prompt_logprobs(instance, batch, top))  # type: ignore[misc]
            results.update(zip(rows, scores, strict=True))
        return [results[row] for row in range(len(prompts))]

    async def timelines(self) -> list[list[TraceEvent]]:
        """Returns the events of the engine, for `timeline.together`."""
        return [self.engine.timeline.events()]

    def counters(self) -> EngineCounters:
        """Returns counters and gauges of the engine; see `EngineCounters`."""
        return EngineCounters.from_engine(self.engine, self.busy_s)

    def cache(self) -> PrefixCacheStats | None:
        """Returns the statistics of the caching pool and its servers, or None if there is none."""
        context = self.engine.mover.context
        return context.stats() if context else None

    def workers(self) -> list[WorkerLoad]:
        """Returns an empty list: the engine of this process serves the requests."""
        return []

    def instances(self, npus: Mapping[str, NpuRange]) -> list[InstanceLoad]:
        """Returns the load of each instance; `npus` has the NPUs of each, by its name."""
        return InstanceLoad.from_engine(self.engine, npus)

    def cancel(self, generation: Generation, indices: set[int], reason: str) -> None:
        """Ends requests of a generation, between two steps."""

        def cancel() -> None:
            for live in [x for x in self.live.values() if x.generation is generation and x.index in indices]:
                self.engine.cancel(live.request, reason=reason)

        with contextlib.suppress(Unavailable):  # nothing runs any more
            self._post(cancel)

    async def call(self, function: Callable[[], T]) -> T:
        """Returns the result of a function that the engine's thread calls between two steps.

        Raises:
          Unavailable: The engine is broken, or the service has stopped.
        """
        return await asyncio.wrap_future(self._post(function))

    def _post(self, function: Callable[[], T]) -> "concurrent.futures.Future[T]":
        future: concurrent.futures.Future[T] = concurrent.futures.Future()
        with self._wakeup:
            if self.broken or self._stopping:
                raise Unavailable(self.broken or "the server has stopped")
            self._calls.append((future, function))
            self._wakeup.notify()
        return future

    async def drain(self, timeout_s: float) -> None:
        """Takes no new request, and waits until all have finished and their pages have been fetched.

        After `timeout_s` seconds the remaining requests end with an error.
        """
        self.draining = True
        deadline = time.monotonic() + timeout_s
        try:
            while (self.live or self.engine.outbox.waiting) and time.monotonic() < deadline:
                await asyncio.sleep(0.02)
        finally:  # also when the wait is cancelled
            self._end(Interrupted("the server is shutting down: the request was not finished"))

    async def close(self) -> None:
        """Stops the thread after the step that runs."""
        await asyncio.to_thread(self.stop)

    def stop(self, timeout_s: float = 10.0) -> bool:
        """Stops the thread after the step that runs.

        Returns:
          False if it still runs after `timeout_s` seconds, as it may while a program is compiled.
        """
        with self._wakeup:
            self._stopping = True
            self._wakeup.notify()
        self._thread.join(timeout_s)
        return not self._thread.is_alive()

    # on the engine's thread

    def _serve(self) -> None:
        ended: float | None = None  # time at which the last step ended, while there is work
        while True:
            with self._wakeup:
                while not (self._calls or self._stopping or self.engine.busy):
                    ended = None
                    self._wakeup.wait()
                calls = list(self._calls)
                self._calls.clear()
            if self._stopping or self.broken:
                return self._refuse(calls)
            for future, function in calls:
                _answer(future, function)
            if self.engine.busy:
                began = time.perf_counter() if ended is None else ended
                self._step()
                ended = time.perf_counter()
                self.busy_s += ended - began
            self._hand_over()

    def _submit(
        self,
        generation: Generation,
        submit: Sequence[Callable[[], Request]],
        already_sent: int,
    ) -> None:
        submitted: list[ActiveRequest] = []
        try:
            for index, call in enumerate(submit):
                submitted.append(ActiveRequest(generation, index, call(), already_sent))
        except BaseException:
            for live in submitted:
                self.engine.cancel(live.request)
            raise
        self.live.update({live.request: live for live in submitted})

    def _step(self) -> None:
        try:
            self.engine.step()
        except Exception as error:
            log.exception("a step failed")
            kind = type(error).__name__
            self._end(StepFailed(f"a step of the engine failed ({kind}): the request was not finished"))
            self.live.clear()
            try:
                self.engine.reset()
            except Exception:
                log.exception("the engine cannot be reset")
                self.broken = "the engine failed and cannot be reset: restart the server"

    def _hand_over(self) -> None:
        """Sends all new chunks to the event loop, as one batch."""
        now = self.engine.scheduler.clock()
        chunks = []
        for request, live in list(self.live.items()):
            chunk = live.chunk(now)
            if chunk is not None:
                chunks.append((live.generation, chunk))
            if request.finish_reason is not None:
                del self.live[request]
        if chunks:
            self._publish(chunks)

    def _end(self, error: Interrupted) -> None:
        """Ends all requests with an error for their clients; the event loop may call it during a step."""
        now, live = self.engine.scheduler.clock(), list(self.live.values())
        self._publish([(x.generation, x.end(now, error)) for x in live if not x.ended])

    def _publish(self, chunks: list[tuple[Generation, Chunk]]) -> None:
        with contextlib.suppress(RuntimeError):  # the loop is closed
            self._loop.call_soon_threadsafe(self._deliver, chunks)

    def _deliver(self, chunks: list[tuple[Generation, Chunk]]) -> None:
        for generation, chunk in chunks:
            generation.put(chunk)
            for watcher in self.watchers:
                watcher(chunk)

    def _refuse(self, calls: list[tuple["concurrent.futures.Future[Any]", Callable[[], Any]]]) -> None:
        for future, _ in calls:
            if future.set_running_or_notify_cancel():
                future.set_exception(Unavailable(self.broken or "the server has stopped"))


def _answer(future: "concurrent.futures.Future[Any]", function: Callable[[], Any]) -> None:
    if not future.set_running_or_notify_cancel():
        return
    try:
        future.set_result(function())
    except BaseException as error:  # for the caller to handle
        future.set_exception(error)
