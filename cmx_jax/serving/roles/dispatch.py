"""The course of a routed request: prefill on one worker, decode on another, again elsewhere after a loss."""

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, replace
from typing import Any

from cmx_jax.errors import CmxError
from cmx_jax.serving.kv import TransferError, new_id
from cmx_jax.serving.roles.members import Member, Members
from cmx_jax.serving.roles.messages import (
    DecodeRequest,
    Params,
    PrefillAnswer,
    PrefillRequest,
    logprobs_from_json,
)
from cmx_jax.serving.roles.peer import PeerError, Refused
from cmx_jax.serving.scheduling.request import Request, TokenLogprob
from cmx_jax.serving.service.generation import Chunk, Generation, Interrupted

log = logging.getLogger(__name__)
ATTEMPTS = 5  # without a new token, one after the other, before a request fails
POLICIES = ("recompute", "fail")


class Preempted(CmxError):
    """A decode worker needed the pages for other requests; the worker itself is healthy."""


@dataclass(eq=False)
class DispatchedRequest:
    """A routed request.

    Attributes:
      generation: Generation that receives the tokens.
      index: Index of the request within the generation.
      request: The request, with its tokens so far.
      last_chunk: Time of the last chunk, or of arrival, in seconds of `time.perf_counter`.
      task: Task that serves the request.
      ended: True once the last chunk was made.
    """

    generation: Generation
    index: int
    request: Request
    last_chunk: float
    task: "asyncio.Task[None] | None" = None
    ended: bool = False

    def chunk(
        self,
        tokens: list[int],
        logprobs: list[TokenLogprob],
        finish_reason: str | None,
        error: Exception | None = None,
    ) -> Chunk:
        """Adds tokens to the request and returns them as its next chunk."""
        self.ended = finish_reason is not None
        request, now = self.request, time.perf_counter()
        first = bool(tokens) and not request.tokens
        request.tokens += tokens
        if first:
            request.first_token = now
        gap, age, self.last_chunk = now - self.last_chunk, now - request.arrived, now
        return Chunk(self.index, request, tokens, logprobs, finish_reason, error, first, gap, age)


class Dispatcher:
    """Has workers serve requests.

    Attributes:
      members: Workers.
      policy: Reaction to the loss of a worker or of pages under way, one of `POLICIES`.
      retried: Number of times that a request was tried again.
    """

    def __init__(self, members: Members, policy: str, publish: Callable[[Chunk], None]):
        """Starts without requests.

        Args:
          members: Workers.
          policy: Reaction to the loss of a worker or of pages under way.
          publish: Function that is called with each chunk, after its generation has received it.

        Raises:
          CmxError: The policy does not exist.
        """
        if policy not in POLICIES:
            raise CmxError(f"kv_failure_policy is {policy!r}, expected one of {', '.join(POLICIES)}")
        self.members, self.policy = members, policy
        self.retried = 0
        self._publish = publish
        self._tasks: set[asyncio.Task[None]] = set()

    def begin(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        """Starts a task that `close` waits for."""
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    async def close(self) -> None:
        """Waits for all tasks."""
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def serve(self, job: DispatchedRequest) -> None:
        """Serves a request to its end, which may be an error."""
        request = job.request
        try:
            await self._until_done(job)
        except asyncio.CancelledError:
            error = Interrupted(request.error or "the request was cancelled")
            self._give(job, [], [], request.finish_reason or "abort", error)
        except Exception as error:
            if not isinstance(error, CmxError):
                log.exception("a request failed")
            request.error = str(error)
            self._give(job, [], [], "error", error)

    async def _until_done(self, job: DispatchedRequest) -> None:
        failures = 0
        while True:
            tokens_before = len(job.request.tokens)
            try:
                return await self._attempt(job)
            except (PeerError, TransferError, Preempted) as error:
                if job.ended:
                    return
                failures = 0 if len(job.request.tokens) > tokens_before else failures + 1
                lost = job.request.tokens and not isinstance(error, Refused | Preempted)
                if (lost and self.policy != "recompute") or failures >= ATTEMPTS:
                    raise
                self.retried += 1
                log.warning("request %s goes on elsewhere: %s", job.request.id, error)

    async def _attempt(self, job: DispatchedRequest) -> None:
        """Prefills prompt and tokens so far, and decodes until the end or until a worker is lost."""
        request = job.request
        params = replace(request.params, max_tokens=request.params.max_tokens - len(request.tokens))
        body = PrefillRequest(
            prompt=[*request.prompt, *request.tokens],
            params=Params.from_sampling(params),
            transfer_id=new_id(),
            priority=request.priority,
            namespace=request.namespace,
        )
        sender, answer = await self._prefill(body)
        if not request.tokens:
            request.cached_tokens = answer.reused_tokens
        logprobs = logprobs_from_json([answer.logprob]) if answer.logprob else []
        self._give(job, [answer.token], logprobs, answer.finish_reason)
        if answer.finish_reason is None:
            await self._decode(job, sender, body, answer)

    async def _prefill(self, body: PrefillRequest) -> tuple[Member, PrefillAnswer]:
        member = await self.members.least_loaded("prefill")
        async with member.busy(len(body.prompt)) as peer:
            try:
                return member, await peer.prefill(body)
            except (asyncio.CancelledError, PeerError):
                self._withdraw(member, body.transfer_id)
                raise

    async def _decode(
        self, job: DispatchedRequest, sender: Member, prefilled: PrefillRequest, answer: PrefillAnswer
    ) -> None:
        body = DecodeRequest(
            prompt=prefilled.prompt,
            params=prefilled.params,
            priority=prefilled.priority,
            first=answer.token,
            logprob=answer.logprob,
            drafts=answer.drafts,
            control=sender.peer.url,
            kv_transfer_params=answer.kv_transfer_params or {},
        )
        fetched, load = False, len(body.prompt) + body.params.max_tokens
        try:
            member = await self.members.least_loaded("decode")
            async with member.busy(load) as peer, contextlib.aclosing(peer.decode(body)) as lines:
                async for line in lines:
                    fetched = True
                    if line.finish_reason == "preempted":
                        raise Preempted(f"{member.peer.url} had no room left for it")
                    self._give(job, line.tokens, logprobs_from_json(line.logprobs), line.finish_reason)
        finally:
            if not fetched:
                self._withdraw(sender, prefilled.transfer_id)

    def _withdraw(self, sender: Member, transfer_id: int) -> None:
        """Tells a prefill worker that its pages will not be fetched; if that fails, their lease ends."""

        async def tell() -> None:
            with contextlib.suppress(CmxError):
                await sender.peer.kv(transfer_id, "withdraw")

        self.begin(tell())

    def _give(
        self,
        job: DispatchedRequest,
        tokens: list[int],
        logprobs: list[TokenLogprob],
        finish_reason: str | None,
        error: Exception | None = None,
    ) -> None:
        """Forwards new tokens, unless the request has ended."""
        if not job.ended:
            chunk = job.chunk(tokens, logprobs, finish_reason, error)
            job.generation.put(chunk)
            self._publish(chunk)
