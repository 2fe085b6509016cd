"""The serving loop: requests wait, are prefilled on one instance, move their pages, decode on another.

One `step` of the loop: admit what waits, run every prefill instance that has work, move finished prompts to
decode instances, run one step of each of these. Requests join and leave the decode batch between steps. What
goes where is `scheduler.py`'s, how pages come there `movement.py`'s.

One thread at a time may use an engine.
"""

import time
from collections.abc import Sequence
from contextlib import ExitStack

from cmx_jax.errors import CmxError
from cmx_jax.mesh.placement import check_slots
from cmx_jax.model.rebalance import Move
from cmx_jax.model.sharding import shared_in_slots
from cmx_jax.serving.engine.movement import Movement, check_pages, decodes
from cmx_jax.serving.executor.instance import Instance
from cmx_jax.serving.kv import LeasedPages
from cmx_jax.serving.kv.prefix_cache import ContextCache
from cmx_jax.serving.scheduling.request import Request, SamplingParams, State
from cmx_jax.serving.scheduling.waiting import check_limits, check_queue


class Engine(Movement):
    """Prefill and decode instances; one may be both (`prefill == decode`).

    Attributes:
      eplb_interval: decode steps after which decode instances' experts are rebalanced; 0: never.
      moves: what that did.
      max_num_queued_reqs: requests that may wait for a place; further ones are refused. None: any number.
      max_num_queued_tokens: of prompts that wait, likewise.
      queue_ttl_s: seconds that a request waits for its first place before it fails; None: for ever.
      steps: decode turns so far.
      step_s, busy_s: seconds in which a program ran, and of all turns in which one did.
    """

    def __init__(
        self,
        prefill: Sequence[Instance],
        decode: Instance | Sequence[Instance],
        eplb_interval: int = 0,
        *,
        context: ContextCache | None = None,
        outbox: LeasedPages | None = None,
        recompute: bool = True,
        max_num_queued_reqs: int | None = None,
        max_num_queued_tokens: int | None = None,
        queue_ttl_s: float | None = None,
    ):
        """Puts instances to work.

        Args:
          prefill: those that take prompts.
          decode: one or several that continue them.
          eplb_interval: see above.
          context: the cache of prompts' blocks.
          outbox: what carries pages from prefill to decode; None: one within this process.
          recompute: whether a prompt whose pages are lost on their way runs again; if not, it fails.
          max_num_queued_reqs: see above.
          max_num_queued_tokens: see above.
          queue_ttl_s: see above.

        Raises:
          CmxError: a number is out of range, or a layout's slots cannot be rebalanced, or instances do not
            have the same pages, or there is none.
        """
        if eplb_interval < 0:
            raise CmxError(f"eplb_interval is {eplb_interval}, expected zero (never) or more")
        check_limits(
            max_num_queued_reqs=max_num_queued_reqs,
            max_num_queued_tokens=max_num_queued_tokens,
            queue_ttl_s=queue_ttl_s,
        )
        decoders = [decode] if isinstance(decode, Instance) else list(decode)
        self.eplb_interval = eplb_interval
        self.max_num_queued_reqs, self.max_num_queued_tokens = max_num_queued_reqs, max_num_queued_tokens
        self.queue_ttl_s = queue_ttl_s
        self.moves: list[Move] = []
        self.steps = 0
        self.step_s = self.busy_s = 0.0
        self._next: tuple[list[Instance], list[Instance], float] | None = None
        self._check_slots(decoders)
        super().__init__(list(prefill), decoders, context, outbox, recompute)

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
        if not self.prefill:
            raise CmxError("there is no prefill instance here: send prompts to a process that has one")
        c = self.prefill[0].config
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
        if self.waiting:
            counts = {
                "max_num_queued_reqs": (self.max_num_queued_reqs, len(self.waiting) + 1),
                "max_num_queued_tokens": (self.max_num_queued_tokens, self.waiting.tokens + len(prompt)),
            }
            check_queue(counts, lambda: self.clock() - self.waiting.first().arrived)
        self._queue(request)
        return request

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
        finished += self._move()
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

    def _prefill(self, instance: Instance) -> list[Request]:
        """One prefill step; returns those whose first token was their last."""
        began, finished = time.perf_counter(), []
        with self.timeline.step(instance.name, "prefill", requests=len(instance.prefilling)):
            through = instance.prefill()
        self.step_s += time.perf_counter() - began
        ends = {request: request.add(request.first, instance.config.eos_token_ids) for request in through}
        self._store(instance, [r for r in through if ends[r] or instance in self._both])
        for request, last in ends.items():
            self._prefilled(instance, request, last)
            finished += [request] * last
        return finished

    def _decode(self) -> list[Request]:
        """One step of each decode instance that has sequences; returns those that are through."""
        finished: list[Request] = []
        for instance in self.decoders:
            finished += self._grow(instance)
        running = [instance for instance in self.decoders if decodes(instance)]
        began = time.perf_counter()
        with ExitStack() as steps:
            for instance in running:
                sequences = sum(row is not None for row in instance.rows)
                steps.enter_context(self.timeline.step(instance.name, "decode", sequences=sequences))
                instance.start_decode()
            while self.later:
                self.later.popleft()()
            ended = [(instance, instance.end_decode()) for instance in running]
        for instance, came in ended:
            for request, tokens in came.items():
                if any(request.add(token, instance.config.eos_token_ids) for token in tokens):
                    del request.logprobs[len(request.tokens) :]  # what is behind the last token is void
                    self._keep_generated(instance, request)
                    self._finish(instance, request)
                    finished.append(request)
        if running:
            self.step_s += time.perf_counter() - began
            self.steps += 1
            if self.eplb_interval and self.steps % self.eplb_interval == 0:
                self.moves += [instance.rebalance() for instance in self.decoders]
        return finished

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
        check_pages([*prefill, *decoders, *self.instances])
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
