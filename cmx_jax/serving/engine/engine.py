"""The serving loop: requests wait, are prefilled on one instance, move their pages, decode on another.

One `step` of the loop: admit waiting requests, move prefilled prompts to decode instances, start one step of
each of these, start every prefill instance that has work, and wait for decode. Decode does not wait for
prefill: a prefill step that takes longer than a decode step ends in a later turn. An instance that does both
prefills first. Requests join and leave the decode batch between steps. An engine has a `Scheduler`, which
decides what runs where, `PrefillSteps`, which start and end, and a `PageMover`, which moves pages.

One thread at a time may use an engine.
"""

import time
from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

from cmx_jax.errors import CmxError
from cmx_jax.model.rebalance import Move
from cmx_jax.serving.engine.checks import check_context, check_pages, check_prompt, check_rebalanced
from cmx_jax.serving.engine.page_mover import PageMover
from cmx_jax.serving.engine.prefill_steps import PrefillSteps
from cmx_jax.serving.engine.recarve import Recarver
from cmx_jax.serving.engine.timeline import Timeline
from cmx_jax.serving.executor.instance import Instance
from cmx_jax.serving.executor.rebalancing import rebalance_all
from cmx_jax.serving.kv import LeasedPages, Local, RemotePages
from cmx_jax.serving.kv.prefix_cache import ContextCache
from cmx_jax.serving.scheduling.request import Request, SamplingParams, State, TokenLogprob
from cmx_jax.serving.scheduling.scheduler import Scheduler
from cmx_jax.serving.scheduling.waiting import QueueLimits, Waiting


class Engine:
    """Serves requests with prefill and decode instances; an instance may be in both lists.

    Without decode instances a request ends with its first token: its `finish_reason` is `transfer`, and
    `mover.tickets` has the ticket by which another process fetches its pages. Without prefill instances
    requests come by `receive`, and a preempted one ends with the finish reason `preempted`.

    Attributes:
      scheduler: Decides which requests run on which instances.
      mover: Moves KV pages between instances, and to and from the caching pool.
      outbox: Lends pages from prefill to decode.
      timeline: Events of requests and instances.
      limits: Limits of the waiting queue; `submit` refuses requests that exceed them.
      eplb_interval: Decode steps after which the experts of decode instances are rebalanced; 0: never.
      moves: Results of the rebalancings of decode instances so far.
      prefills: Starts and ends prefill steps.
      overlapped_steps: Number of decode turns so far during which a prefill step was running.
      steps: Number of decode turns so far.
      busy_s: Seconds of all turns in which a program ran.
    """

    def __init__(
        self,
        prefill: Sequence[Instance],
        decode: Instance | Sequence[Instance],
        eplb_interval: int = 0,
        *,
        prefill_eplb_interval: int = 0,
        context: ContextCache | None = None,
        outbox: LeasedPages | None = None,
        recompute: bool = True,
        limits: QueueLimits | None = None,
    ):
        """Puts instances to work.

        Args:
          prefill: Instances that take prompts.
          decode: One or several instances that continue them.
          eplb_interval: Decode steps between two rebalancings of the experts; 0: never.
          prefill_eplb_interval: Prefill steps between two rebalancings of the experts of prefill instances;
            0: never.
          context: Cache of prompts' KV blocks.
          outbox: Lends pages from prefill to decode; None: within this process.
          recompute: True if a prompt whose pages are lost in transfer runs again; otherwise it fails.
          limits: Limits of the waiting queue; None: no limits.

        Raises:
          CmxError: Negative interval, slots that cannot be rebalanced, different pages, or no instances.
        """
        if eplb_interval < 0:
            raise CmxError(f"eplb_interval is {eplb_interval}, expected zero (never) or more")
        decoders = [decode] if isinstance(decode, Instance) else list(decode)
        if not (instances := [*prefill, *decoders]):
            raise CmxError("an engine without instances, expected at least one that prefills or decodes")
        self.eplb_interval, self.limits = eplb_interval, limits or QueueLimits()
        self.moves: list[Move] = []
        self.steps = self.overlapped_steps = 0
        self._decode_s = self.busy_s = 0.0
        check_rebalanced(decoders if eplb_interval else ())
        check_pages(instances)
        lookahead = 1 + max(instance.programs.num_speculative_tokens for instance in instances)
        self.scheduler = Scheduler(list(prefill), decoders, time.perf_counter, lookahead)
        self.timeline = Timeline()
        self.outbox = outbox or LeasedPages(Local(), instances[0].programs.fingerprint())
        self.mover = PageMover(self.scheduler, self.timeline, self.outbox, context, recompute)
        self.scheduler.subscribe(self.timeline.on_change)
        self.prefills = PrefillSteps(self.scheduler, self.mover, self.timeline, prefill_eplb_interval)
        self._recarver = Recarver(self.scheduler)

    def reset_counters(self) -> None:
        """Sets all counters of the engine and its instances to zero, as after a warm-up."""
        self.steps = self.overlapped_steps = 0
        self._decode_s = self.busy_s = 0.0
        self.moves.clear()
        self.prefills.reset_counters()
        self.mover.reset_counters()
        for instance in self.instances:
            instance.reset_counters()

    @property
    def step_s(self) -> float:
        """Seconds of decode steps, and of waiting for prefill steps."""
        return self._decode_s + self.prefills.step_s

    @property
    def prefill(self) -> list[Instance]:
        """Prefill instances."""
        return self.scheduler.prefill

    @property
    def decoders(self) -> list[Instance]:
        """Decode instances."""
        return self.scheduler.decoders

    @property
    def decode(self) -> Instance:
        """The first decode instance."""
        return self.decoders[0]

    @property
    def instances(self) -> list[Instance]:
        """All instances, each once."""
        return self.scheduler.instances

    @property
    def waiting(self) -> Waiting:
        """Requests without a place."""
        return self.scheduler.waiting

    def submit(
        self, prompt: list[int], params: SamplingParams, *, priority: int = 0, namespace: str = ""
    ) -> Request:
        """Queues a prompt of token ids.

        Args:
          prompt: Token ids, at least one.
          params: Sampling parameters.
          priority: Priority of the request; smaller numbers go first.
          namespace: Namespace of the context cache; requests share blocks within their own only.

        Raises:
          Overloaded: The waiting queue is full.
          CmxError: The prompt is empty, holds an id outside the vocabulary, or cannot fit the context or the
            cache.
        """
        if not self.prefill:
            raise CmxError("there is no prefill instance here: send prompts to a process that has one")
        config = self.prefill[0].config
        check_prompt(prompt, config)
        request = Request(
            list(prompt), params, priority=priority, namespace=namespace, arrived=self.scheduler.clock()
        )
        check_context(request, config)
        if waiting := self.waiting:
            oldest, tokens = waiting.first(), waiting.tokens + len(prompt)
            self.limits.check(len(waiting) + 1, tokens, lambda: self.scheduler.clock() - oldest.arrived)
        self.scheduler.enqueue(request)
        return request

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
        """Continues a request that was prefilled in another process.

        Args:
          prompt: Token ids of the prompt.
          params: Sampling parameters; `max_tokens` includes the first token.
          first: The token after the prompt.
          drafts: Draft tokens after `first`.
          pages: Pages of the prompt, `[pages, L, W, C]` on the host.
          priority: Priority of the request; smaller numbers go first.
          logprob: Log-probability of the first token, where it was asked for.

        Raises:
          CmxError: There is no decode instance, or its cache is too small.
        """
        if not self.decoders:
            raise CmxError("there is no decode instance here: send the request to a process that has one")
        request = Request(list(prompt), params, priority=priority, state=State.TRANSFER)
        request.tokens, request.drafts = [first], drafts
        request.logprobs = [] if logprob is None else [logprob]
        request.arrived = request.first_token = self.scheduler.clock()
        self.scheduler.enqueue_transfer(RemotePages(pages), request)
        return request

    def cancel(self, request: Request, reason: str = "abort", error: str | None = None) -> None:
        """Ends a request in any state and frees what it holds at once; a finished one stays as it is."""
        self.scheduler.cancel(request, reason, error)

    def reset(self) -> None:
        """Forgets all requests, as after a step that was broken off."""
        self.waiting.clear()
        self.scheduler.transfers.clear()
        self.mover.reset()
        self.timeline.forget()
        self.prefills.reset()
        for instance in self.instances:
            instance.reset()

    @property
    def busy(self) -> bool:
        """True while a request is unfinished or a change of instances is pending."""
        placed = any(instance.allocator.places for instance in self.instances)
        waits = self.waiting or self.scheduler.transfers or self._recarver.pending
        return bool(waits or placed or self.prefills.running)

    def run(self) -> None:
        """Steps until every submitted request is finished."""
        while self.busy:
            self.step()

    def step(self) -> list[Request]:
        """Runs one turn of the loop; returns the requests that finished in it."""
        began, before, finished = time.perf_counter(), self.step_s, self._expire()
        self._recarver.apply()
        for instance, request in self.scheduler.admit():
            self.mover.fetch_blocks(instance, request)
        self.mover.put_blocks()
        finished += self.prefills.run_blocking()
        finished += self.mover.move() if self.decoders else self.mover.hand_over()
        finished += self._decode() + self.prefills.end_ready()
        self.busy_s += time.perf_counter() - began if self.step_s > before else 0.0
        return finished

    def _expire(self) -> list[Request]:
        """Fails requests that have waited too long for their first place, and returns them."""
        ttl_s = self.limits.queue_ttl_s
        expired = [] if ttl_s is None else self.waiting.expired(self.scheduler.clock() - ttl_s)
        for request in expired:
            self.cancel(request, "error", f"waited longer than {ttl_s:g} s for a place")
        return expired

    def _decode(self) -> list[Request]:
        """Runs one step of each decode instance that has sequences, and starts prefill steps beside it.

        Returns:
          The requests that finished.
        """
        finished = [r for instance in self.decoders for r in self.scheduler.grow(instance)]
        running = [instance for instance in self.decoders if instance.allocator.decodes]
        began = time.perf_counter()
        with ExitStack() as steps:
            for instance in running:
                sequences = sum(row is not None for row in instance.allocator.rows)
                steps.enter_context(self.timeline.step(instance.name, "decode", sequences=sequences))
                instance.start_decode()
            self.prefills.start()
            self.mover.run_deferred()
            overlapped = bool(running and self.prefills.running)
            generated = [(instance, instance.end_decode()) for instance in running]
        for instance, tokens_of in generated:
            for request, tokens in tokens_of.items():
                if any(request.add(token, instance.config.eos_token_ids) for token in tokens):
                    del request.logprobs[len(request.tokens) :]  # those after the last token are void
                    self.mover.store_generated(instance, request)
                    self.scheduler.finish(instance, request)
                    finished.append(request)
        if running:
            self._decode_s += time.perf_counter() - began
            self.steps += 1
            self.overlapped_steps += overlapped
            if self.eplb_interval and self.steps % self.eplb_interval == 0:
                self.moves += rebalance_all(self.decoders)
        return finished

    def recarve(
        self, prefill: Sequence[Instance], decoders: Sequence[Instance], grace_s: float = 30.0
    ) -> None:
        """Replaces the instances; see `Recarver`. Requests that still run after `grace_s` seconds wait again.

        Raises:
          CmxError: Instances have different pages, slots cannot be rebalanced, or a kind has no instance.
        """
        if not prefill or not decoders:
            raise CmxError("expected at least one prefill and one decode instance")
        check_pages([*prefill, *decoders, *self.instances])
        check_rebalanced(decoders if self.eplb_interval else ())
        check_rebalanced(prefill if self.prefills.eplb_interval else ())
        self._recarver.begin(prefill, decoders, grace_s)
