"""How pages come to where a request runs: out of the caching pool, between instances, between processes."""

import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, wait
from typing import Any

import jax

from cmx_jax.errors import CmxError
from cmx_jax.serving.engine.timeline import Timeline
from cmx_jax.serving.executor.instance import Instance
from cmx_jax.serving.kv import LeasedPages, Local, RemotePages, Ticket, TransferError, transfer_locally
from cmx_jax.serving.kv.prefix_cache import ContextCache
from cmx_jax.serving.scheduling.request import Request, SamplingParams, State, TokenLogprob
from cmx_jax.serving.scheduling.scheduler import Scheduler

PATIENCE_S = 0.02  # for blocks, when there is nothing else to do


class Movement(Scheduler[Instance]):
    """A scheduler of instances that hold real pages, with what moves these.

    Where the other pool is in other processes there are instances of one kind only. Without decode instances
    a request ends with its first token: its `finish_reason` is `transfer`, and `tickets` has what its pages
    are fetched with. Without prefill instances requests come by `receive`, and who is preempted ends as that.

    Attributes:
      context: the cache of prompts' blocks, or None.
      fetching: requests that were placed and wait for blocks.
      outbox: carries pages from prefill to decode.
      recompute: whether a prompt whose pages are lost on their way runs again; if not, it fails.
      lost: how many were.
      tickets: of prompts for other processes; whoever reads one takes it out.
      later: calls that are made while the next decode step runs.
      timeline: what happened.
    """

    def __init__(
        self,
        prefill: list[Instance],
        decoders: list[Instance],
        context: ContextCache | None,
        outbox: LeasedPages | None,
        recompute: bool,
    ):
        instances = [*prefill, *decoders]
        if not instances:
            raise CmxError("an engine without instances, expected at least one that prefills or decodes")
        check_pages(instances)
        self.context, self.recompute, self.lost = context, recompute, 0
        self.fetching: dict[Request, tuple[Instance, Future[list[Any]]]] = {}
        self.tickets: dict[Request, Ticket] = {}
        self.later: deque[Callable[[], None]] = deque()
        self.timeline = Timeline()
        self.ahead = 1 + max(instance.num_speculative_tokens for instance in instances)
        self.outbox = outbox or LeasedPages(Local(), instances[0].fingerprint())
        super().__init__(prefill, decoders, time.perf_counter)

    def reset(self) -> None:
        """Forgets all requests, as after a step that was broken off."""
        for held in (self.waiting, self.transfers, self.fetching, self.tickets, self.later):
            held.clear()
        self.timeline.forget()
        for instance in self.instances:
            instance.reset()

    # out of the caching pool, and into it

    def _look_up(self, instance: Instance, request: Request) -> None:
        """Lets a request that was placed wait for its blocks, if there may be any."""
        self.timeline.enters(request, "prefill", instance=instance.name)
        if self.context is not None and len(request.inputs) > self.context.block:
            instance.prefilling.remove(request)
            self.timeline.enters(request, "fetch blocks", instance=instance.name)
            self.fetching[request] = instance, self.context.lookup(request.inputs, request.namespace)

    def _fetched(self) -> None:
        """Puts blocks that have come into pages; what is behind them is left to prefill."""
        if self.fetching and not any(i.prefilling for i in self.prefill) and not decodes(*self.decoders):
            wait([future for _, future in self.fetching.values()], PATIENCE_S, "FIRST_COMPLETED")
        for request, (instance, future) in list(self.fetching.items()):
            if not future.done():
                continue
            del self.fetching[request]
            blocks = future.result()
            if blocks and self.context is not None:
                instance.put_pages([request], [self.context.joined(blocks)])
                request.prefilled = len(blocks) * self.context.block
                self.context.hits += request.prefilled
                request.kept_tokens = max(request.kept_tokens, request.prefilled)
                if not request.preemptions:
                    request.reused_tokens = request.prefilled
            instance.prefilling.append(request)
            self.timeline.enters(request, "prefill", instance=instance.name, reused=request.prefilled)

    def _store(self, instance: Instance, requests: list[Request]) -> None:
        """Copies the pages of prompts that do not move on, for the cache."""
        new = [r for r in requests if self._new_blocks(r)]
        if new:
            ranks = [instance.places[request].rank for request in new]
            for request, pages in zip(new, instance.take_pages(new, ranks, instance.ranks), strict=True):
                self._keep(request, pages)

    def _new_blocks(self, request: Request) -> bool:
        block = self.context.block if self.context else 0
        return block > 0 and len(request.inputs) // block > request.kept_tokens // block

    def _keep(self, request: Request, pages: Any) -> None:
        """Stores the blocks of a prompt, while a step runs."""
        context = self.context
        if context is not None and self._new_blocks(request):
            inputs, known = request.inputs, request.kept_tokens // context.block
            request.kept_tokens = len(inputs)
            self.later.append(lambda: context.store(inputs, request.namespace, pages, known))

    def _keep_generated(self, instance: Instance, request: Request) -> None:
        """Stores the blocks of a text that is complete, but for its last token, which has no row: the next
        turn of a conversation begins with it, unless it is of a model whose thinking is left out there."""
        if self.context is not None and self.context.generated:
            request.inputs = [*request.prompt, *request.tokens[:-1]]
            self._store(instance, [request])

    # from prefill to decode

    def _move(self) -> list[Request]:
        """Moves the pages of prefilled requests to decode ranks, all that one instance sends at once; returns
        those that are through here."""
        if not self.decoders:
            return self._hand_over()
        moving: dict[tuple[Any, Instance], list[Request]] = {}
        for source, target, request in self._receive():
            moving.setdefault((source, target), []).append(request)
        failed = []
        for (source, target), requests in moving.items():
            receivers = [target.places[request].rank for request in requests]
            pages = source.take_pages(requests, receivers, target.layout.data_ranks)
            came = {}
            for request, of in zip(requests, pages, strict=True):
                try:
                    came[request] = (
                        of if isinstance(source, RemotePages) else transfer_locally(self.outbox, of)
                    )
                except TransferError as error:
                    failed += self._lost(source, target, request, error)
            if came:
                target.put_pages(list(came), list(came.values()))
            for request, of in came.items():
                self._keep(request, of)
                self._moved(source, request)
                self.timeline.moved(request, source.name, target.name, len(jax.tree.leaves(of)[0]))
                self.timeline.enters(request, "decode", instance=target.name)
        return failed

    def _lost(self, source: Any, target: Instance, request: Request, why: TransferError) -> list[Request]:
        """Runs the prompt of lost pages again, or lets the request fail, and returns it."""
        self.lost += 1
        source.release(request)
        if self.recompute:
            self._preempt(target, request)
            return []
        request.finish_reason, request.error = "error", str(why)
        self._finish(target, request)
        return [request]

    # to other processes, and from them

    def _hand_over(self) -> list[Request]:
        """Ends requests that another process will continue, and keeps their pages for it."""
        over: dict[Instance, list[Request]] = {}
        for source, request in self.transfers:
            over.setdefault(source, []).append(request)
        self.transfers.clear()
        for source, requests in over.items():
            ranks = [source.places[request].rank for request in requests]
            taken = source.take_pages(requests, ranks, source.ranks)
            for request, pages in zip(requests, taken, strict=True):
                self.tickets[request] = self.outbox.offer(pages, request.transfer_id)
                self._keep(request, pages)
                request.finish_reason = "transfer"
                self._finish(source, request)
        return [request for requests in over.values() for request in requests]

    def receive(
        self,
        prompt: list[int],
        params: SamplingParams,
        *,
        first: int,
        drafts: list[int],
        pages: Any,
        priority: int = 0,
        logprob: TokenLogprob | None = None,
    ) -> Request:
        """Continues a request that was prefilled elsewhere.

        Args:
          prompt: its tokens.
          params: how it is continued; the first token counts.
          first: the token behind the prompt.
          drafts: what is expected behind that.
          pages: of the prompt, `[pages, L, W, C]` on the host.
          priority: smaller ones go first.
          logprob: of the first token, where it was asked for.

        Raises:
          CmxError: there is no decode instance, or its cache is too small.
        """
        if not self.decoders:
            raise CmxError("there is no decode instance here: send the request to a process that has one")
        request = Request(list(prompt), params, priority=priority, state=State.TRANSFER)
        request.tokens, request.drafts = [first], drafts
        request.logprobs = [] if logprob is None else [logprob]
        request.arrived = request.first_token = self.clock()
        self._check_rooms(request)
        source: Any = RemotePages(pages)
        self.transfers.append((source, request))
        self.timeline.enters(request, "transfer")
        return request

    def _queue(self, request: Request) -> None:
        super()._queue(request)
        self.timeline.enters(request, "waiting")

    def _prefilled(self, at: Instance, request: Request, last: bool) -> None:
        super()._prefilled(at, request, last)
        if not last:
            self.timeline.enters(request, request.state.value, instance=at.name)

    def _requeue(self, request: Request) -> None:
        self.fetching.pop(request, None)
        if self.prefill:
            super()._requeue(request)
            self.timeline.enters(request, "waiting", preempted=request.preemptions)
        else:
            request.finish_reason = "preempted"
            self._finish(None, request)

    def _finish(self, at: Instance | None, request: Request) -> None:
        self.fetching.pop(request, None)
        super()._finish(at, request)
        self.timeline.ends(request)


def check_pages(instances: Sequence[Instance]) -> None:
    """Whether all have pages that mean the same.

    Raises:
      CmxError: two have not.
    """
    one = instances[-1]
    for instance in instances:
        if instance.page != one.page:
            raise CmxError(
                f"{instance.name} has pages of {instance.page}, expected {one.name}'s {one.page}: give both "
                "the same page width, dtype, kv_cache_dtype and num_speculative_tokens"
            )


def decodes(*instances: Instance) -> bool:
    """Whether any has a sequence that decodes."""
    return any(r is not None and r.state is State.DECODE for i in instances for r in i.rows)
