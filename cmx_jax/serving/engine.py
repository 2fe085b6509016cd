"""The serving loop: requests wait, are prefilled on one instance, move their pages, decode on another.

One `step` of the loop: admit what waits, run every prefill instance that has work, move finished prompts to
the decode instance, run one decode step. Requests join and leave the decode batch between steps. What goes
where is `scheduler.py`'s.
"""

import time

from cmx_jax.errors import CmxError
from cmx_jax.mesh.placement import check_slots
from cmx_jax.model.placement import Move
from cmx_jax.model.sharding import shared_in_slots
from cmx_jax.serving.instance import Instance
from cmx_jax.serving.request import Request, SamplingParams
from cmx_jax.serving.scheduler import Scheduler


class Engine(Scheduler[Instance]):
    """Prefill instances and one decode instance; they may be the same one (`prefill == [decode]`).

    Attributes:
      eplb_interval: decode steps after which the decode instance's experts are rebalanced; 0: never.
      moves: what that did.

    Raises:
      CmxError: `eplb_interval` is negative, or the layout's slots cannot be rebalanced, or instances do not
        have the same pages.
    """

    def __init__(self, prefill: list[Instance], decode: Instance, eplb_interval: int = 0):
        if eplb_interval < 0:
            raise CmxError(f"eplb_interval is {eplb_interval}, expected zero (never) or more")
        for instance in prefill:
            if instance.page != decode.page:
                raise CmxError(
                    f"{instance.name} has pages of {instance.page}, expected {decode.name}'s "
                    f"{decode.page}: give both the same page width, dtype, kv_cache_dtype and "
                    "num_speculative_tokens"
                )
        if eplb_interval:
            c, layout = decode.config, decode.layout
            check_slots(layout, c.n_routed_experts, shared_in_slots(c, layout))
        super().__init__(prefill, [decode], time.perf_counter)
        self.decode, self.eplb_interval = decode, eplb_interval
        self.moves: list[Move] = []
        self._steps = 0

    def submit(self, prompt: list[int], params: SamplingParams) -> Request:
        """Queues a prompt of token ids.

        Raises:
          CmxError: it is empty, holds an id outside the vocabulary, or cannot fit the context or the cache.
        """
        c = self.decode.config
        if not prompt:
            raise CmxError("the prompt is empty, expected at least one token")
        for token in prompt:
            if not 0 <= token < c.vocab_size:
                raise CmxError(f"the prompt holds token id {token}, expected ids in [0, {c.vocab_size})")
        request = Request(list(prompt), params, arrived=self.clock())
        if request.total_tokens > c.max_position_embeddings:
            raise CmxError(
                f"a prompt of {len(prompt)} tokens and max_tokens {params.max_tokens} exceed the context of "
                f"{c.max_position_embeddings}: shorten the prompt or ask for fewer tokens"
            )
        self._queue(request)
        return request

    def reset(self) -> None:
        """Forgets all requests, as after a step that was broken off."""
        self.waiting.clear()
        self.transfers.clear()
        for instance in {*self.prefill, self.decode}:
            instance.reset()

    @property
    def busy(self) -> bool:
        running = any(i.prefilling for i in self.prefill) or any(self.decode.rows)
        return bool(self.waiting or self.transfers or running)

    def run(self) -> None:
        """Steps until every submitted request is finished."""
        while self.busy:
            self.step()

    def step(self) -> list[Request]:
        """One turn of the loop; returns the requests that finished in it."""
        finished: list[Request] = []
        eos = self.decode.config.eos_token_ids
        self._admit()
        for instance in self.prefill:
            for request in instance.prefill() if instance.prefilling else ():
                last = request.add(request.first, eos)
                self._prefilled(instance, request, last)
                finished += [request] * last
        self._move()
        if any(r is not None and r.tokens for r in self.decode.rows):
            for request, tokens in self.decode.decode().items():
                if any(request.add(token, eos) for token in tokens):  # what is behind the last one is void
                    self._finish(self.decode, request)
                    finished.append(request)
            self._steps += 1
            if self.eplb_interval and self._steps % self.eplb_interval == 0:
                self.moves.append(self.decode.rebalance())
        return finished

    def _move(self) -> None:
        """Copies the pages of prefilled requests to decode ranks, all that one instance sends at once."""
        moving: dict[Instance, list[Request]] = {}
        for source, _, request in self._receive():
            moving.setdefault(source, []).append(request)
        for source, requests in moving.items():
            receivers = [self.decode.places[request].rank for request in requests]
            pages = source.take_pages(requests, receivers, self.decode.layout.data_ranks)
            self.decode.put_pages(requests, pages)
            for request in requests:
                self._moved(source, request)
