"""Moves KV pages to where requests run: from the caching pool, between instances, to other processes."""

from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, wait
from typing import Any

import jax

from cmx_jax.serving.engine.timeline import Timeline
from cmx_jax.serving.executor.instance import Instance
from cmx_jax.serving.kv import LeasedPages, RemotePages, Ticket, TransferError, transfer_locally
from cmx_jax.serving.kv.prefix_cache import BlockPool, ContextCache
from cmx_jax.serving.scheduling.request import Request, State
from cmx_jax.serving.scheduling.scheduler import Scheduler

PATIENCE_S = 0.02  # longest wait for blocks when there is nothing else to do


class PageMover:
    """Carries out a scheduler's moves with the real pages of its instances.

    Attributes:
      context: Cache of prompts' KV blocks, or None.
      fetching: Placed requests that wait for their blocks, with their instance and the pending look-up.
      outbox: Lends pages from prefill to decode.
      recompute: True if a prompt whose pages are lost in transfer runs again; otherwise it fails.
      lost: Number of prompts whose pages were lost.
      moved_bytes: Number of bytes of the pages that decode received from prefill.
      tickets: Tickets of prompts that another process continues; the reader of a ticket removes it.
      deferred: Functions to run while the next decode step is in flight.
    """

    def __init__(
        self,
        scheduler: Scheduler[Instance],
        timeline: Timeline,
        outbox: LeasedPages,
        context: ContextCache | None = None,
        recompute: bool = True,
    ):
        self._scheduler, self._timeline = scheduler, timeline
        self.outbox, self.context, self.recompute = outbox, context, recompute
        self.lost = self.moved_bytes = 0
        self.fetching: dict[Request, tuple[Instance, Future[list[Any]]]] = {}
        self.tickets: dict[Request, Ticket] = {}
        self.deferred: deque[Callable[[], None]] = deque()
        scheduler.subscribe(self._on_change)

    def _on_change(self, request: Request, state: State, instance: Any) -> None:
        """Forgets the blocks of a request that has lost its place."""
        del instance
        if state in (State.WAITING, State.FINISHED):
            self.fetching.pop(request, None)

    def reset(self) -> None:
        """Forgets all requests, as after a step that was broken off."""
        for queue in (self.fetching, self.tickets, self.deferred):
            queue.clear()

    def reset_counters(self) -> None:
        """Sets all counters to zero, those of the context cache included."""
        self.lost = self.moved_bytes = 0
        if self.context is not None:
            self.context.reset_counters()

    def run_deferred(self) -> None:
        """Runs the deferred functions."""
        while self.deferred:
            self.deferred.popleft()()

    # from the caching pool and into it

    def reuse_blocks(self, pool: BlockPool, block: int, model: str, generated: bool = False) -> None:
        """Reuses the KV blocks of prompts from a caching pool, and stores new ones there.

        Args:
          pool: The caching pool.
          block: Number of tokens per block.
          model: Id of the weights.
          generated: True to store generated text, too; see `ContextCache`.

        Raises:
          CmxError: A block is not a whole number of pages.
        """
        programs = self._scheduler.instances[0].programs
        fingerprint = programs.fingerprint(model).of(block)
        self.context = ContextCache(pool, fingerprint, programs.cache.pages, generated)

    def fetch_blocks(self, instance: Instance, request: Request) -> None:
        """Starts to fetch the cached blocks of a placed request, which waits for them."""
        if self.context is not None and len(request.prefill_tokens) > self.context.block:
            instance.allocator.prefilling.remove(request)
            self._timeline.enters(request, "fetch blocks", instance=instance.name)
            self.fetching[request] = (
                instance,
                self.context.lookup(request.prefill_tokens, request.namespace),
            )

    def put_blocks(self) -> None:
        """Puts blocks that have arrived into pages; prefill runs the tokens after them."""
        scheduler = self._scheduler
        idle = not any(i.allocator.prefilling for i in scheduler.prefill)
        if self.fetching and idle and not any(i.allocator.decodes for i in scheduler.decoders):
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
                request.stored_tokens = max(request.stored_tokens, request.prefilled)
                if not request.preemptions:
                    request.cached_tokens = request.prefilled
            instance.allocator.prefilling.append(request)
            self._timeline.enters(request, "prefill", instance=instance.name, reused=request.prefilled)

    def store(self, instance: Instance, requests: list[Request]) -> None:
        """Stores the new blocks of prompts whose pages stay on their instance, while a step runs."""
        new = [r for r in requests if self._has_new_blocks(r)]
        if new:
            ranks = [instance.allocator.places[request].rank for request in new]
            for request, pages in zip(
                new, instance.take_pages(new, ranks, instance.allocator.ranks), strict=True
            ):
                self._store_pages(request, pages)

    def store_generated(self, instance: Instance, request: Request) -> None:
        """Stores the KV blocks of a finished text, except its last token, which has no KV row.

        The next turn of a conversation starts with this text, except for reasoning models, whose thinking is
        dropped.
        """
        if self.context is not None and self.context.generated:
            request.prefill_tokens = [*request.prompt, *request.tokens[:-1]]
            self.store(instance, [request])

    def _has_new_blocks(self, request: Request) -> bool:
        block = self.context.block if self.context else 0
        return block > 0 and len(request.prefill_tokens) // block > request.stored_tokens // block

    def _store_pages(self, request: Request, pages: Any) -> None:
        """Stores the blocks of a prompt whose pages were copied, while a step runs."""
        context = self.context
        if context is not None and self._has_new_blocks(request):
            tokens, known = request.prefill_tokens, request.stored_tokens // context.block
            request.stored_tokens = len(tokens)
            self.deferred.append(lambda: context.store(tokens, request.namespace, pages, known))

    # from prefill to decode

    def move(self) -> list[Request]:
        """Moves the pages of prefilled requests to decode ranks, with one copy for each pair of instances.

        Returns:
          The requests that failed because their pages were lost.
        """
        moves: dict[tuple[Any, Instance], list[Request]] = {}
        for source, target, request in self._scheduler.receive():
            moves.setdefault((source, target), []).append(request)
        failed = []
        for (source, target), requests in moves.items():
            receivers = [target.allocator.places[request].rank for request in requests]
            sent = source.take_pages(requests, receivers, target.layout.data_ranks)
            received = {}
            for request, pages in zip(requests, sent, strict=True):
                try:
                    received[request] = (
                        pages if isinstance(source, RemotePages) else transfer_locally(self.outbox, pages)
                    )
                except TransferError as error:
                    failed += self._lose(source, target, request, error)
            if received:
                target.put_pages(list(received), list(received.values()))
            for request, pages in received.items():
                self.moved_bytes += sum(leaf.nbytes for leaf in jax.tree.leaves(pages))
                self._store_pages(request, pages)
                self._timeline.moved(request, source.name, target.name, len(jax.tree.leaves(pages)[0]))
                self._scheduler.finish_move(source, target, request)
        return failed

    def _lose(self, source: Any, target: Instance, request: Request, error: TransferError) -> list[Request]:
        """Runs the prompt of lost pages again, or lets its request fail; returns the requests that ended."""
        self.lost += 1
        source.release(request)
        if self.recompute:
            self._scheduler.preempt(target, request)
            return []
        request.finish_reason, request.error = "error", str(error)
        self._scheduler.finish(target, request)
        return [request]

    # to other processes

    def hand_over(self) -> list[Request]:
        """Ends all prefilled requests here, and keeps their pages for the processes that continue them.

        Returns:
          The requests that ended, each with a ticket.
        """
        transfers = self._scheduler.transfers
        leaving: dict[Instance, list[Request]] = {}
        for source, request in transfers:
            leaving.setdefault(source, []).append(request)
        transfers.clear()
        for source, requests in leaving.items():
            ranks = [source.allocator.places[request].rank for request in requests]
            taken = source.take_pages(requests, ranks, source.allocator.ranks)
            for request, pages in zip(requests, taken, strict=True):
                self.tickets[request] = self.outbox.offer(pages, request.transfer_id)
                self._store_pages(request, pages)
                request.finish_reason = "transfer"
                self._scheduler.finish(source, request)
        return [request for requests in leaving.values() for request in requests]
