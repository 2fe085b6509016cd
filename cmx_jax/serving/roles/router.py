"""The router: takes requests as `Service` does, and has workers serve them."""

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from cmx_jax.errors import CmxError
from cmx_jax.serving.kv import TransferError, new_id
from cmx_jax.serving.roles.members import Member, Members
from cmx_jax.serving.roles.messages import DecodeRequest, Params, PrefillAnswer, PrefillRequest, heard
from cmx_jax.serving.roles.peer import PeerError, Refused
from cmx_jax.serving.scheduling.request import Request, SamplingParams, TokenLogprob
from cmx_jax.serving.scheduling.waiting import check_limits, check_queue
from cmx_jax.serving.service.frontend import Unavailable
from cmx_jax.serving.service.generation import Chunk, Generation, Interrupted

T = TypeVar("T")
log = logging.getLogger(__name__)
ATTEMPTS = 5  # in vain, one behind the other, before a request fails
POLICIES = ("recompute", "fail")


class Preempted(CmxError):
    """A decode worker needed the pages for others: nothing is wrong with it."""


@dataclass(eq=False)
class _Job:
    """A request, who waits for it, when he was last given something, and whether that was the last."""

    generation: Generation
    index: int
    request: Request
    at: float
    task: "asyncio.Task[None] | None" = None
    ended: bool = False


class Router:
    """Serves with workers what a `Service` serves with an engine, behind the same methods.

    * A request goes to the worker of each kind that has the least to do, whatever it holds (section 2).
    * Whatever fails is tried again on another worker, with the tokens that are there as part of the prompt,
      if the policy is `recompute`; the client sees no more than a pause. With `fail` it is an error, once
      there is a token.
    * A worker that fails gets nothing until it answers again.

    Attributes:
      members: the workers.
      live: requests that are not finished.
      draining, watchers: as of `Service`.
      retried: how often something was tried again.
    """

    def __init__(
        self,
        members: Members,
        *,
        policy: str = "recompute",
        max_num_queued_reqs: int | None = None,
        max_num_queued_tokens: int | None = None,
    ):
        """Puts a router before workers.

        Args:
          members: these.
          policy: what is done when a worker, or pages on their way, are lost.
          max_num_queued_reqs: requests without a first token; further ones are refused. None: any number.
          max_num_queued_tokens: of their prompts, likewise.

        Raises:
          CmxError: there is no such policy, or a limit lets nothing in.
        """
        if policy not in POLICIES:
            raise CmxError(f"kv_failure_policy is {policy!r}, expected one of {', '.join(POLICIES)}")
        self._limits = {
            "max_num_queued_reqs": max_num_queued_reqs,
            "max_num_queued_tokens": max_num_queued_tokens,
        }
        check_limits(**self._limits)
        self.members, self.policy = members, policy
        self.live: dict[Request, _Job] = {}
        self.draining = False
        self.watchers: list[Callable[[Chunk], None]] = []
        self.retried = 0
        self._tasks: set[asyncio.Task[None]] = set()

    @property
    def broken(self) -> str | None:
        """Why no request can be served at the moment, or None."""
        return self.members.missing() or None

    async def start(self) -> None:
        """Looks for the workers."""
        await self.members.start()

    async def generate(
        self,
        requests: Sequence[tuple[list[int], SamplingParams]],
        *,
        priority: int = 0,
        namespace: str = "",
    ) -> Generation:
        """See `Service.generate`."""
        if self.draining:
            raise Unavailable("the server is shutting down: ask again later, or another one")
        self._check_queue([prompt for prompt, _ in requests])
        generation, now = Generation(len(requests), self.cancel), time.perf_counter()
        for index, (prompt, params) in enumerate(requests):
            request = Request(list(prompt), params, priority=priority, namespace=namespace, arrived=now)
            job = self.live[request] = _Job(generation, index, request, now)
            job.task = self._begin(self._serve(job))
        return generation

    def _check_queue(self, prompts: Sequence[list[int]]) -> None:
        waiting = self._waiting()
        tokens = sum(len(request.prompt) for request in waiting) + sum(map(len, prompts))
        counts = {"max_num_queued_reqs": len(waiting) + len(prompts), "max_num_queued_tokens": tokens}
        if waiting:
            check_queue(
                {name: (limit, counts[name]) for name, limit in self._limits.items()},
                lambda: time.perf_counter() - min(request.arrived for request in waiting),
            )

    def _waiting(self) -> list[Request]:
        return [request for request in self.live if request.first_token is None]

    def cancel(self, generation: Generation, indices: set[int], reason: str) -> None:
        """Ends requests of a generation; the worker that has one hears of it as the connection ends."""
        for job in list(self.live.values()):
            if job.generation is generation and job.index in indices and job.task is not None:
                job.request.finish_reason = reason
                job.task.cancel()

    async def score(self, prompts: Sequence[Sequence[int]], top: int) -> list[list[TokenLogprob | None]]:
        """See `Service.score`; a prefill worker says it."""
        for _ in range(ATTEMPTS - 1):
            with contextlib.suppress(PeerError):
                return await self._scored(prompts, top)
        return await self._scored(prompts, top)

    async def _scored(self, prompts: Sequence[Sequence[int]], top: int) -> list[list[TokenLogprob | None]]:
        member = await self.members.least("prefill")
        async with member.busy(sum(map(len, prompts))) as peer:
            return await peer.score(prompts, top)

    async def drain(self, timeout_s: float) -> None:
        """See `Service.drain`; workers are not told."""
        self.draining = True
        until = time.monotonic() + timeout_s
        try:
            while self.live and time.monotonic() < until:
                await asyncio.sleep(0.02)
        finally:
            for job in list(self.live.values()):
                job.request.finish_reason = "error"
                job.request.error = "the server is shutting down: the request was not finished"
                if job.task is not None:
                    job.task.cancel()

    async def close(self) -> None:
        """Forgets the workers, once they were told what they need to know."""
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self.members.close()

    async def call(self, function: Callable[[], T]) -> T:
        """See `Service.call`; there is no engine whose steps would be in the way."""
        return function()

    async def timelines(self) -> list[list[dict[str, Any]]]:
        """See `Service.timelines`: of the workers that answer."""
        asked = (member.peer.timeline() for member in self.members.all)
        said = await asyncio.gather(*asked, return_exceptions=True)
        return [events for events in said if not isinstance(events, BaseException)]

    def counts(self) -> dict[str, Any]:
        """See `Service.counts`."""
        own = {"waiting": len(self._waiting()), "retried": self.retried}
        return {**self.members.counts(), **own, "workers": self.members.workers()}

    def cache(self) -> dict[str, Any]:
        """See `Service.cache`: the pools are the workers', whose metrics have them."""
        return {}

    def instances(self, npus: Any = None) -> list[dict[str, Any]]:
        """See `Service.instances`."""
        del npus  # each worker has its own
        return self.members.instances()

    # one request

    async def _serve(self, job: _Job) -> None:
        request = job.request
        try:
            await self._until_done(job)
        except asyncio.CancelledError:
            ended = Interrupted(request.error or "the request was cancelled")
            self._give(job, [], [], request.finish_reason or "abort", ended)
        except Exception as error:
            if not isinstance(error, CmxError):
                log.exception("a request failed")
            request.error = str(error)
            self._give(job, [], [], "error", error)
        finally:
            self.live.pop(request, None)

    async def _until_done(self, job: _Job) -> None:
        failures = 0
        while True:
            had = len(job.request.tokens)
            try:
                return await self._attempt(job)
            except (PeerError, TransferError, Preempted) as error:
                if job.ended:
                    return
                failures = 0 if len(job.request.tokens) > had else failures + 1
                lost = job.request.tokens and not isinstance(error, Refused | Preempted)
                again = self.policy == "recompute" or not lost
                if not again or failures >= ATTEMPTS:
                    raise
                self.retried += 1
                log.warning("request %s goes on elsewhere: %s", job.request.id, error)

    async def _attempt(self, job: _Job) -> None:
        """Prefills what there is, and decodes it until the end, or until a worker is lost."""
        request = job.request
        body = PrefillRequest(
            prompt=[*request.prompt, *request.tokens],
            params=Params.of(
                replace(request.params, max_tokens=request.params.max_tokens - len(request.tokens))
            ),
            transfer_id=new_id(),
            priority=request.priority,
            namespace=request.namespace,
        )
        sender, answer = await self._prefill(body)
        if not request.tokens:
            request.cached_tokens = answer.reused_tokens
        logprobs = heard([answer.logprob]) if answer.logprob else []
        self._give(job, [answer.token], logprobs, answer.finish_reason)
        if answer.finish_reason is None:
            await self._decode(job, sender, body, answer)

    async def _prefill(self, body: PrefillRequest) -> tuple[Member, PrefillAnswer]:
        member = await self.members.least("prefill")
        async with member.busy(len(body.prompt)) as peer:
            try:
                return member, await peer.prefill(body)
            except (asyncio.CancelledError, PeerError):
                self._withdraw(member, body.transfer_id)
                raise

    async def _decode(self, job: _Job, sender: Member, given: PrefillRequest, first: PrefillAnswer) -> None:
        body = DecodeRequest(
            prompt=given.prompt,
            params=given.params,
            priority=given.priority,
            first=first.token,
            logprob=first.logprob,
            drafts=first.drafts,
            control=sender.peer.url,
            kv_transfer_params=first.kv_transfer_params or {},
        )
        fetched, load = False, len(body.prompt) + body.params.max_tokens
        try:
            member = await self.members.least("decode")
            async with member.busy(load) as peer, contextlib.aclosing(peer.decode(body)) as lines:
                async for line in lines:
                    fetched = True
                    if line.finish_reason == "preempted":
                        raise Preempted(f"{member.peer.url} had no room left for it")
                    self._give(job, line.tokens, heard(line.logprobs), line.finish_reason)
        finally:
            if not fetched:
                self._withdraw(sender, given.transfer_id)

    def _withdraw(self, sender: Member, transfer_id: int) -> None:
        """Tells whoever keeps pages that nobody comes for them; if that fails, their lease ends."""

        async def tell() -> None:
            with contextlib.suppress(CmxError):
                await sender.peer.kv(transfer_id, "withdraw")

        self._begin(tell())

    def _begin(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    def _give(
        self,
        job: _Job,
        tokens: list[int],
        logprobs: list[TokenLogprob],
        finish_reason: str | None,
        error: Exception | None = None,
    ) -> None:
        """Hands on what is new, unless the request was ended."""
        if job.ended:
            return
        job.ended = finish_reason is not None
        request, now = job.request, time.perf_counter()
        first = bool(tokens) and not request.tokens
        request.tokens += tokens
        if first:
            request.first_token = now
        gap, age, job.at = now - job.at, now - request.arrived, now
        chunk = Chunk(job.index, request, tokens, logprobs, finish_reason, error, first, gap, age)
        job.generation.put(chunk)
        for watch in self.watchers:
            watch(chunk)
