"""The router: a `Frontend` whose requests are served by workers in other processes."""

import asyncio
import contextlib
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import TypeVar

from cmx_jax.serving.deploy.site import NpuRange
from cmx_jax.serving.engine.timeline import TraceEvent
from cmx_jax.serving.roles.dispatch import ATTEMPTS, DispatchedRequest, Dispatcher
from cmx_jax.serving.roles.members import Members
from cmx_jax.serving.roles.peer import PeerError
from cmx_jax.serving.scheduling.request import Request, SamplingParams, TokenLogprob
from cmx_jax.serving.scheduling.waiting import QueueLimits
from cmx_jax.serving.service.counters import EngineCounters, InstanceLoad, WorkerLoad
from cmx_jax.serving.service.frontend import Frontend, Unavailable
from cmx_jax.serving.service.generation import Chunk, Generation

T = TypeVar("T")


class Router(Frontend):
    """Serves requests with workers, as a `Service` does with an engine.

    * A request goes to the worker of each kind with the least load, whatever that worker has cached (section
      2).
    * With the policy `recompute`, a request that fails is tried again on another worker, with its tokens so
      far as part of the prompt; the client notices no more than a pause. With `fail`, a failure after the
      first token is an error.
    * A worker that fails gets no request until it answers again.

    Attributes:
      members: Workers.
      limits: Limits of requests without a first token.
      live: Requests that are not finished.
      draining: True while new requests are refused.
      watchers: Functions that get each chunk of an answer.
    """

    def __init__(
        self,
        members: Members,
        *,
        policy: str = "recompute",
        limits: QueueLimits | None = None,
    ):
        """Puts a router in front of workers.

        Args:
          members: Workers.
          policy: Reaction to the loss of a worker or of pages under way: `recompute` or `fail`.
          limits: Limits of requests without a first token; None is no limits.

        Raises:
          CmxError: The policy does not exist.
        """
        self._dispatcher = Dispatcher(members, policy, self._publish)
        self.members, self.limits = members, limits or QueueLimits()
        self.live: dict[Request, DispatchedRequest] = {}
        self.draining = False
        self.watchers: list[Callable[[Chunk], None]] = []

    @property
    def broken(self) -> str | None:
        """Reason why no request can be served at the moment, or None."""
        return self.members.missing() or None

    @property
    def retried(self) -> int:
        """Number of times that a request was tried again."""
        return self._dispatcher.retried

    async def start(self) -> None:
        """Starts polling the workers."""
        await self.members.start()

    async def generate(
        self,
        requests: Sequence[tuple[list[int], SamplingParams]],
        *,
        priority: int = 0,
        namespace: str = "",
    ) -> Generation:
        """Submits prompts of token ids, all or none; for arguments and errors see `Frontend.generate`."""
        if self.draining:
            raise Unavailable("the server is shutting down: ask again later, or another one")
        self._check_queue([prompt for prompt, _ in requests])
        generation, now = Generation(len(requests), self.cancel), time.perf_counter()
        for index, (prompt, params) in enumerate(requests):
            request = Request(list(prompt), params, priority=priority, namespace=namespace, arrived=now)
            job = self.live[request] = DispatchedRequest(generation, index, request, now)
            job.task = self._dispatcher.begin(self._serve(job))
        return generation

    async def _serve(self, job: DispatchedRequest) -> None:
        try:
            await self._dispatcher.serve(job)
        finally:
            self.live.pop(job.request, None)

    def _publish(self, chunk: Chunk) -> None:
        for watch in self.watchers:
            watch(chunk)

    def _check_queue(self, prompts: Sequence[list[int]]) -> None:
        waiting = self._waiting()
        tokens = sum(len(request.prompt) for request in waiting) + sum(map(len, prompts))
        if waiting:
            self.limits.check(
                len(waiting) + len(prompts),
                tokens,
                lambda: time.perf_counter() - min(request.arrived for request in waiting),
            )

    def _waiting(self) -> list[Request]:
        return [request for request in self.live if request.first_token is None]

    def cancel(self, generation: Generation, indices: set[int], reason: str) -> None:
        """Ends requests of a generation; their workers notice it when the connections close."""
        for job in list(self.live.values()):
            if job.generation is generation and job.index in indices and job.task is not None:
                job.request.finish_reason = reason
                job.task.cancel()

    async def score(self, prompts: Sequence[Sequence[int]], top: int) -> list[list[TokenLogprob | None]]:
        """Returns the log-probability of each token of prompts, computed by a prefill worker."""
        for _ in range(ATTEMPTS - 1):
            with contextlib.suppress(PeerError):
                return await self._score_once(prompts, top)
        return await self._score_once(prompts, top)

    async def _score_once(
        self, prompts: Sequence[Sequence[int]], top: int
    ) -> list[list[TokenLogprob | None]]:
        member = await self.members.least_loaded("prefill")
        async with member.busy(sum(map(len, prompts))) as peer:
            return await peer.score(prompts, top)

    async def drain(self, timeout_s: float) -> None:
        """Takes no new request, waits up to `timeout_s` seconds for those that run, then ends them.

        The workers are not told.
        """
        self.draining = True
        deadline = time.monotonic() + timeout_s
        try:
            while self.live and time.monotonic() < deadline:
                await asyncio.sleep(0.02)
        finally:
            for job in list(self.live.values()):
                job.request.finish_reason = "error"
                job.request.error = "the server is shutting down: the request was not finished"
                if job.task is not None:
                    job.task.cancel()

    async def close(self) -> None:
        """Waits for the last messages to the workers, then closes the connections."""
        await self._dispatcher.close()
        await self.members.close()

    async def call(self, function: Callable[[], T]) -> T:
        """Calls a function at once, as there is no engine here whose steps could interfere."""
        return function()

    async def timelines(self) -> list[list[TraceEvent]]:
        """Returns the events of each worker that answers, for `timeline.together`."""
        requests = (member.peer.timeline() for member in self.members.all)
        results = await asyncio.gather(*requests, return_exceptions=True)
        return [events for events in results if not isinstance(events, BaseException)]

    def counters(self) -> EngineCounters:
        """Returns the sums over the workers, with the router's own waiting requests and retries."""
        return replace(self.members.counters(), waiting=len(self._waiting()), retried=self.retried)

    def cache(self) -> None:
        """Returns None: the caching pools belong to the workers, whose metrics have their counters."""
        return None

    def workers(self) -> list[WorkerLoad]:
        """Returns the health and the load of each worker."""
        return self.members.workers()

    def instances(self, npus: Mapping[str, NpuRange] | None = None) -> list[InstanceLoad]:
        """Returns the load of each worker's instances; `npus` is not used, as each worker knows its own."""
        del npus
        return self.members.instances()
