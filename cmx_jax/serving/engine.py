"""The serving loop: requests wait, are prefilled on one instance, move their pages, decode on another.

One `step` of the loop: admit what waits, run every prefill instance that has work, move finished prompts to
decode instances, run one step of each of these. Requests join and leave the decode batch between steps. What
goes where is `scheduler.py`'s. With a context cache (`context.py`) a prompt begins behind the blocks that are
found there: they are fetched while the loop goes on, and put into the pages that the request was given.

One thread at a time may use an engine. What a host has to do beside (store blocks, hand out tokens) waits in
`later` and is done while a decode step runs.
"""

import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, wait
from typing import Any

from cmx_jax.errors import CmxError
from cmx_jax.mesh.placement import check_slots
from cmx_jax.model.placement import Move
from cmx_jax.model.sharding import shared_in_slots
from cmx_jax.serving.context import ContextCache
from cmx_jax.serving.instance import Instance
from cmx_jax.serving.request import Overloaded, Request, SamplingParams, State
from cmx_jax.serving.scheduler import Scheduler

PATIENCE_S = 0.02  # for blocks, when there is nothing else to do


class Engine(Scheduler[Instance]):
    """Prefill and decode instances; one may be both (`prefill == decoders`).

    Attributes:
      eplb_interval: decode steps after which a decode instance's experts are rebalanced; 0: never.
      moves: what that did.
      context: the cache of prompts' blocks, or None.
      later: calls that are made while the next decode step runs.
      steps: decode turns so far; `step_s` and `busy_s`: seconds in which a program ran, and of all turns.

    Raises:
      CmxError: `eplb_interval` is negative, or a layout's slots cannot be rebalanced, or instances do not
        have the same pages.
    """

    def __init__(
        self,
        prefill: Sequence[Instance],
        decode: Instance | Sequence[Instance],
        eplb_interval: int = 0,
        *,
        context: ContextCache | None = None,
        max_num_queued_reqs: int | None = None,
        max_num_queued_tokens: int | None = None,
        queue_ttl_s: float | None = None,
    ):
        """Args:
        prefill: instances that take prompts.
        decode: one or several that continue them.
        eplb_interval: see above.
        context: see above.
        max_num_queued_reqs: requests that may wait for a place; further ones are refused. None: any number.
        max_num_queued_tokens: of prompts that wait, likewise.
        queue_ttl_s: seconds that a request waits for its first place before it fails; None: for ever.
        """
        if eplb_interval < 0:
            raise CmxError(f"eplb_interval is {eplb_interval}, expected zero (never) or more")
        limits = {"max_num_queued_reqs": max_num_queued_reqs, "max_num_queued_tokens": max_num_queued_tokens}
        for name, limit in {**limits, "queue_ttl_s": queue_ttl_s}.items():
            if limit is not None and limit <= 0:
                raise CmxError(f"{name} is {limit}, expected more than zero")
        decoders = [decode] if isinstance(decode, Instance) else list(decode)
        self.eplb_interval, self.context = eplb_interval, context
        self.max_num_queued_reqs, self.max_num_queued_tokens = max_num_queued_reqs, max_num_queued_tokens
        self.queue_ttl_s = queue_ttl_s
        self.moves: list[Move] = []
        self.later: deque[Callable[[], None]] = deque()
        self.fetching: dict[Request, tuple[Instance, Future[list[Any]]]] = {}
        self.steps = 0
        self.step_s = self.busy_s = 0.0
        self._next: tuple[list[Instance], list[Instance], float] | None = None
        _check_pages([*prefill, *decoders])
        self._check_slots(decoders)
        self.ahead = 1 + max((i.num_speculative_tokens for i in decoders), default=0)
        super().__init__(list(prefill), decoders, time.perf_counter)

    def _check_slots(self, decoders: Sequence[Instance]) -> None:
        for instance in decoders if self.eplb_interval else ():
            c, layout = instance.config, instance.layout
            check_slots(layout, c.n_routed_experts, shared_in_slots(c, layout))

    @property
    def decode(self) -> Instance:
        """The first decode instance."""
        return self.decoders[0]

    def submit(
        self, prompt: list[int], params: SamplingParams, *, priority: int = 0, namespace: str = ""
    ) -> Request:
        """Queues a prompt of token ids.

        Args:
          prompt: at least one.
          params: how it is continued.
          priority: smaller ones go first.
          namespace: of the context cache; requests share blocks with those of their own only.

        Raises:
          Overloaded: too many wait already.
          CmxError: it is empty, holds an id outside the vocabulary, or cannot fit the context or the cache.
        """
        c = self.instances[0].config
        if not prompt:
            raise CmxError("the prompt is empty, expected at least one token")
        for token in prompt:
            if not 0 <= token < c.vocab_size:
                raise CmxError(f"the prompt holds token id {token}, expected ids in [0, {c.vocab_size})")
        request = Request(list(prompt), params, priority=priority, namespace=namespace, arrived=self.clock())
        if request.total_tokens > c.max_position_embeddings:
            raise CmxError(
                f"a prompt of {len(prompt)} tokens and max_tokens {params.max_tokens} exceed the context of "
                f"{c.max_position_embeddings}: shorten the prompt or ask for fewer tokens"
            )
        self._check_queue(len(prompt))
        self._queue(request)
        return request

    def _check_queue(self, tokens: int) -> None:
        """Whether one more may wait. Who is told to come again is told to do so after as long as the first of
        those who wait has waited: that is what the queue takes at present."""
        full = {
            "max_num_queued_reqs": (self.max_num_queued_reqs, len(self.waiting) + 1),
            "max_num_queued_tokens": (self.max_num_queued_tokens, self.waiting.tokens + tokens),
        }
        for name, (limit, count) in full.items():
            if self.waiting and limit is not None and count > limit:
                waited = self.clock() - self.waiting.first().arrived
                raise Overloaded(f"the queue is full ({name} {limit}), come again later", max(waited, 1.0))

    def reset(self) -> None:
        """Forgets all requests, as after a step that was broken off."""
        self.waiting.clear()
        self.transfers.clear()
        self.fetching.clear()
        self.later.clear()
        for instance in self.instances:
            instance.reset()

    @property
    def busy(self) -> bool:
        placed = any(instance.places for instance in self.instances)
        return bool(self.waiting or self.transfers or placed or self._next)

    def run(self) -> None:
        """Steps until every submitted request is finished."""
        while self.busy:
            self.step()

    def step(self) -> list[Request]:
        """One turn of the loop; returns the requests that finished in it."""
        began, before = time.perf_counter(), self.step_s
        finished = self._expired()
        self._turn_over()
        for instance, request in self._admit():
            self._look_up(instance, request)
        self._fetched()
        for instance in self.prefill:
            finished += self._prefill(instance) if instance.prefilling else []
        self._move()
        finished += self._decode()
        if self.step_s > before:
            self.busy_s += time.perf_counter() - began
        return finished

    def _expired(self) -> list[Request]:
        """Fails what has waited too long for its first place."""
        if self.queue_ttl_s is None:
            return []
        oldest = self.clock() - self.queue_ttl_s
        late = [r for r in self.waiting if r.arrived < oldest and not r.preemptions]
        for request in late:
            self.cancel(request, "error", f"waited longer than {self.queue_ttl_s:g} s for a place")
        return late

    def _look_up(self, instance: Instance, request: Request) -> None:
        """Lets a request that was placed wait for its blocks, if there may be any."""
        if self.context is not None and len(request.inputs) > self.context.block:
            instance.prefilling.remove(request)
            self.fetching[request] = instance, self.context.lookup(request.inputs, request.namespace)

    def _fetched(self) -> None:
        """Puts blocks that have come into pages; what is behind them is left to prefill."""
        if (
            self.fetching
            and not any(i.prefilling for i in self.prefill)
            and not self._decodes(*self.decoders)
        ):
            wait([future for _, future in self.fetching.values()], PATIENCE_S, "FIRST_COMPLETED")
        for request, (instance, future) in list(self.fetching.items()):
            if not future.done():
                continue
            del self.fetching[request]
            blocks = (
                [] if future.exception() else future.result()
            )  # an error is a miss, and the pool's to count
            if blocks and self.context is not None:
                instance.put_pages([request], [self.context.joined(blocks)])
                request.prefilled = len(blocks) * self.context.block
                self.context.hits += request.prefilled
                if not request.preemptions:
                    request.reused_tokens = request.prefilled
            instance.prefilling.append(request)

    def _prefill(self, instance: Instance) -> list[Request]:
        """One prefill step; returns those whose first token was their last."""
        began, finished = time.perf_counter(), []
        through = instance.prefill()
        self.step_s += time.perf_counter() - began
        ends = {request: request.add(request.first, instance.config.eos_token_ids) for request in through}
        self._store(instance, [r for r in through if ends[r] or instance in self._both])
        for request, last in ends.items():
            self._prefilled(instance, request, last)
            finished += [request] * last
        return finished

    def _store(self, instance: Instance, requests: list[Request]) -> None:
        """Copies the pages of prompts that do not move on, for the cache."""
        new = [r for r in requests if self._new_blocks(r)]
        if new:
            ranks = [instance.places[request].rank for request in new]
            for request, pages in zip(new, instance.take_pages(new, ranks, instance.ranks), strict=True):
                self._keep(request, pages)

    def _new_blocks(self, request: Request) -> bool:
        block = self.context.block if self.context else 0
        return block > 0 and len(request.inputs) // block > request.reused_tokens // block

    def _keep(self, request: Request, pages: Any) -> None:
        """Stores the blocks of a prompt, while a step runs."""
        context = self.context
        if context is not None and self._new_blocks(request):
            known = 0 if request.preemptions else request.reused_tokens // context.block
            inputs = request.inputs
            self.later.append(lambda: context.store(inputs, request.namespace, pages, known))

    def _move(self) -> None:
        """Copies the pages of prefilled requests to decode ranks, all that one instance sends at once."""
        moving: dict[tuple[Instance, Instance], list[Request]] = {}
        for source, target, request in self._receive():
            moving.setdefault((source, target), []).append(request)
        for (source, target), requests in moving.items():
            receivers = [target.places[request].rank for request in requests]
            pages = source.take_pages(requests, receivers, target.layout.data_ranks)
            target.put_pages(requests, pages)
            for request, of in zip(requests, pages, strict=True):
                self._keep(request, of)
                self._moved(source, request)

    @staticmethod
    def _decodes(*instances: Instance) -> bool:
        return any(r is not None and r.state is State.DECODE for i in instances for r in i.rows)

    def _decode(self) -> list[Request]:
        """One step of each decode instance that has sequences; returns those that are through."""
        for instance in self.decoders:
            self._grow(instance)
        running, finished = [i for i in self.decoders if self._decodes(i)], []
        began = time.perf_counter()
        for instance in running:
            instance.start_decode()
        while self.later:
            self.later.popleft()()
        for instance in running:
            for request, tokens in instance.end_decode().items():
                if any(request.add(token, instance.config.eos_token_ids) for token in tokens):
                    self._finish(instance, request)  # what is behind the last token is void
                    finished.append(request)
        if running:
            self.step_s += time.perf_counter() - began
            self.steps += 1
            if self.eplb_interval and self.steps % self.eplb_interval == 0:
                self.moves += [instance.rebalance() for instance in self.decoders]
        return finished

    def _requeue(self, request: Request) -> None:
        self.fetching.pop(request, None)
        super()._requeue(request)

    def _finish(self, at: Instance | None, request: Request) -> None:
        self.fetching.pop(request, None)
        del request.logprobs[len(request.tokens) :]
        super()._finish(at, request)

    def recarve(
        self, prefill: Sequence[Instance], decoders: Sequence[Instance], grace_s: float = 30.0
    ) -> None:
        """Serves with other instances from now on (section 2: the ratio of prefill to decode changes while
        serving). Those that leave get nothing new. When they are done, or `grace_s` seconds have passed, what
        still runs there goes back to the queue with its tokens, and the new ones begin.

        Raises:
          CmxError: instances do not have the same pages, slots cannot be rebalanced, or there is none.
        """
        if not prefill or not decoders:
            raise CmxError("expected at least one prefill and one decode instance")
        _check_pages([*self.instances, *prefill, *decoders])
        self._check_slots(decoders)
        self._next = list(prefill), list(decoders), self.clock() + grace_s
        self.leaving = set(self.instances) - {*prefill, *decoders}

    def _turn_over(self) -> None:
        """Changes the instances, when those that leave are ready or their time is up."""
        if self._next is None:
            return
        prefill, decoders, until = self._next
        left = [(i, r) for i in self.leaving for r in i.places if r.state is not State.TRANSFER]
        if left and self.clock() < until:
            return
        for instance, request in left:
            self._preempt(instance, request)
        self._next = None
        self.leaving = set()
        self._carve(prefill, decoders)


def _check_pages(instances: Sequence[Instance]) -> None:
    first = instances[0]
    for instance in instances[1:]:
        if instance.page != first.page:
            raise CmxError(
                f"{instance.name} has pages of {instance.page}, expected {first.name}'s {first.page}: give "
                "both the same page width, dtype, kv_cache_dtype and num_speculative_tokens"
            )
