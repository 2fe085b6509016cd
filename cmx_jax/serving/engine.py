"""The serving loop: requests wait, are prefilled on one instance, move their pages, decode on another.

One `step` of the loop: admit what waits, run every prefill instance that has work, move finished prompts to
the decode instance, run one decode step. Requests join and leave the decode batch between steps. Any request
may go to any prefill instance and any decode rank: the least loaded is taken (section 2: no affinity).
"""

from collections import deque
from dataclasses import dataclass, field

from cmx_jax.errors import CmxError
from cmx_jax.mesh.placement import check_slots
from cmx_jax.model.placement import Move
from cmx_jax.model.sharding import shared_in_slots
from cmx_jax.serving.instance import Instance
from cmx_jax.serving.pages import pages_for
from cmx_jax.serving.request import Request, SamplingParams, State


@dataclass
class Engine:
    """Prefill instances and one decode instance; they may be the same one (`prefill == [decode]`).

    Attributes:
      eplb_interval: decode steps after which the decode instance's experts are rebalanced; 0: never.
      moves: what that did.

    Raises:
      CmxError: `eplb_interval` is negative, or the layout's slots cannot be rebalanced, or instances do not
        have the same pages.
    """

    prefill: list[Instance]
    decode: Instance
    waiting: deque[Request] = field(default_factory=deque)
    transfers: deque[tuple[Instance, Request]] = field(default_factory=deque)
    eplb_interval: int = 0
    moves: list[Move] = field(default_factory=list)
    _steps: int = 0

    def __post_init__(self) -> None:
        if self.eplb_interval < 0:
            raise CmxError(f"eplb_interval is {self.eplb_interval}, expected zero (never) or more")
        for instance in self.prefill:
            if instance.page != self.decode.page:
                raise CmxError(
                    f"{instance.name} has pages of {instance.page}, expected {self.decode.name}'s "
                    f"{self.decode.page}: give both the same page width, dtype, kv_cache_dtype and "
                    "num_speculative_tokens"
                )
        if self.eplb_interval:
            c, layout = self.decode.config, self.decode.layout
            check_slots(layout, c.n_routed_experts, shared_in_slots(c, layout))

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
        request = Request(list(prompt), params)
        if request.total_tokens > c.max_position_embeddings:
            raise CmxError(
                f"a prompt of {len(prompt)} tokens and max_tokens {params.max_tokens} exceed the context of "
                f"{c.max_position_embeddings}: shorten the prompt or ask for fewer tokens"
            )
        rooms = [(i.capacity, len(prompt)) for i in self.prefill if i is not self.decode]
        for room, tokens in [(self.decode.capacity, request.cached_tokens), *rooms]:
            if pages_for(tokens, room.page_width) > room.pages:
                raise CmxError(
                    f"a prompt of {len(prompt)} tokens and max_tokens {params.max_tokens} exceed a rank's "
                    f"cache of {room.pages} pages of {room.page_width} tokens"
                )
        self.waiting.append(request)
        return request

    def reset(self) -> None:
        """Forgets all requests, as after a step that was broken off."""
        self.waiting.clear()
        self.transfers.clear()
        for instance in {id(i): i for i in (*self.prefill, self.decode)}.values():
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
        self._admit()
        for instance in self.prefill:
            for request in instance.prefill() if instance.prefilling else ():
                self._behind_prefill(instance, request, finished)
        self._move()
        if any(r is not None and r.tokens for r in self.decode.rows):
            for request, tokens in self.decode.decode().items():
                eos = self.decode.config.eos_token_ids
                if any(request.add(token, eos) for token in tokens):  # what is behind the last one is void
                    self._finish(self.decode, request, finished)
            self._steps += 1
            if self.eplb_interval and self._steps % self.eplb_interval == 0:
                self.moves.append(self.decode.rebalance())
        return finished

    def _admit(self) -> None:
        """Places waiting requests in order, until one finds no room."""
        while self.waiting:
            request = self.waiting[0]
            for instance in sorted(self.prefill, key=lambda i: i.load):
                stays = instance is self.decode
                tokens = request.cached_tokens if stays else len(request.prompt)
                if instance.place(request, tokens, decode=stays):
                    instance.prefilling.append(self.waiting.popleft())
                    request.to(State.PREFILL)
                    break
            else:
                return

    def _behind_prefill(self, at: Instance, request: Request, finished: list[Request]) -> None:
        if request.add(request.first, self.decode.config.eos_token_ids):
            self._finish(at, request, finished)
        elif at is self.decode:
            request.to(State.DECODE)
        else:
            request.to(State.TRANSFER)
            self.transfers.append((at, request))

    def _move(self) -> None:
        """Moves the pages of prefilled requests to decode ranks, in order, as far as there is room."""
        moving: dict[str, tuple[Instance, list[Request]]] = {}
        while self.transfers:
            source, request = self.transfers[0]
            if not self.decode.place(request, request.cached_tokens, decode=True):
                break
            self.transfers.popleft()
            moving.setdefault(source.name, (source, []))[1].append(request)
        for source, requests in moving.values():
            receivers = [self.decode.places[request].rank for request in requests]
            pages = source.take_pages(requests, receivers, self.decode.layout.data_ranks)
            self.decode.put_pages(requests, pages)
            for request in requests:
                source.release(request)
                request.to(State.DECODE)

    @staticmethod
    def _finish(at: Instance, request: Request, finished: list[Request]) -> None:
        at.release(request)
        request.to(State.FINISHED)
        finished.append(request)
