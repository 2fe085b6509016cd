"""One instance: a model on a sub-mesh, with its paged KV cache."""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from cmx_jax.mesh.exchange import message_bytes
from cmx_jax.model.batch import DecodeBatch, StepOutput
from cmx_jax.model.cache import NO_PAGE
from cmx_jax.model.rebalance import Move, balanced, describe
from cmx_jax.serving.executor.programs import Op, Programs
from cmx_jax.serving.executor.stats import Traffic, load_of
from cmx_jax.serving.kv.mapping import prefill_tp_rank
from cmx_jax.serving.scheduling.allocator import Place, RankAllocator
from cmx_jax.serving.scheduling.packing import Piece, bucket, pack, sampling
from cmx_jax.serving.scheduling.pages import pages_for
from cmx_jax.serving.scheduling.request import Request, State, TokenLogprob

# A program is compiled for each length, so lengths are few: this many pages, doubled as often as needed.
PREFILL_PAGES = 2
DECODE_PAGES = 8


class _StartedPrefill(NamedTuple):
    """A prefill step that was started.

    Attributes:
      pieces: Chunks of prompts in each batch row.
      places: Place of each request at the start.
      output: Results, which may not be ready.
    """

    pieces: list[list[Piece]]
    places: dict[Request, Place]
    output: StepOutput


class Instance:
    """Runs prefill, decode or both on the ranks of one layout.

    Attributes:
      programs: Weights, KV cache and compiled programs on the devices.
      allocator: Rows and pages of the requests that are placed here.
      name: Name of the instance.
      config: Config of the model.
      layout: Layout of the ranks.
      capacity: Capacity of each rank.
      traffic: Counts of the exchanges and drafts so far.
      computed_tokens: Number of tokens that prefill has run so far; cached ones do not count.
    """

    def __init__(self, programs: Programs):
        self.programs = programs
        self.name, self.config, self.layout = programs.name, programs.config, programs.layout
        self.capacity = programs.capacity
        self.allocator = RankAllocator(self.capacity, self.layout.data_ranks, self.layout.microbatches)
        self.traffic = Traffic()
        self.computed_tokens = 0
        self._prefilling: _StartedPrefill | None = None

    def reset(self) -> None:
        """Forgets all requests and makes a new cache, as after a step that was broken off."""
        self._prefilling = None
        self.allocator.reset()
        self.programs.run(Op.EMPTY, ())

    def reset_counters(self) -> None:
        """Sets all counters to zero."""
        self.traffic, self.computed_tokens = Traffic(), 0

    def release(self, request: Request) -> None:
        """Frees the pages and the row of a request."""
        self.allocator.release(request)

    @property
    def prefill_started(self) -> bool:
        """True between `start_prefill` and `end_prefill`."""
        return self._prefilling is not None

    @property
    def prefill_ready(self) -> bool:
        """True if `end_prefill` need not wait."""
        assert self._prefilling is not None
        return all(leaf.is_ready() for leaf in jax.tree.leaves(self._prefilling.output))

    def prefill(self) -> list[Request]:
        """Starts a prefill step and waits for it; see `end_prefill`."""
        self.start_prefill()
        return self.end_prefill()

    def start_prefill(self) -> None:
        """Starts the next chunks of placed prompts; `end_prefill` waits for them."""
        pieces = self.allocator.next_pieces()
        width = self.capacity.page_width
        unit = math.lcm(PREFILL_PAGES * width, self.layout.sequence_ranks)
        pages = {request: place.pages for request, place in self.allocator.places.items()}
        packed = pack(pieces, pages, width, unit)
        requests = [piece.request for row in pieces for piece in row]
        output = self._start(Op.PREFILL, packed.batch, requests, cached=packed.cached)
        places = {request: self.allocator.places[request] for request in requests}
        self._prefilling = _StartedPrefill(pieces, places, output)

    def end_prefill(self) -> list[Request]:
        """Waits for the prefill step.

        Returns:
          The requests whose prompts are complete, with their next token and drafts. Requests that have lost
          their place since the start are left out.
        """
        assert self._prefilling is not None
        started, self._prefilling = self._prefilling, None
        output = self._result(started.output)
        self.computed_tokens += sum(piece.stop - piece.start for row in started.pieces for piece in row)
        kept = {r for r, place in started.places.items() if self.allocator.places.get(r) is place}
        completed = self.allocator.mark_prefilled(started.pieces, kept)
        for request, row, index in completed:
            request.next_token = int(output.tokens[row, index])
            request.drafts = [] if output.drafts is None else [int(output.drafts[row, index])]
            _add_logprob(request, output, row, index)
        return [request for request, _, _ in completed]

    def start_decode(self) -> None:
        """Starts a step for all requests in state DECODE; `end_decode` waits for it."""
        slots = self.allocator.rows
        running = [(row, r) for row, r in enumerate(slots) if r is not None and r.state is State.DECODE]
        rows, requests = [row for row, _ in running], [r for _, r in running]
        size, width, drafts = len(slots), self.capacity.page_width, self.programs.num_speculative_tokens
        tokens, positions = np.full((size, 1 + drafts), -1, np.int32), np.full(size, -1, np.int32)
        for row, request in running:
            known = [request.tokens[-1], *request.drafts]
            tokens[row, : len(known)] = known
            positions[row] = len(request.prompt) + len(request.tokens) - 1
        longest = bucket(int(positions.max()) + 1 + 2 * drafts, DECODE_PAGES * width)
        table = self._page_table(size, rows, requests, longest // width)
        batch = DecodeBatch(tokens, positions, table, sampling(size, rows, requests))
        self._decoding = running, tokens, self._start(Op.DECODE, batch, requests)

    def end_decode(self) -> dict[Request, list[int]]:
        """Waits for the decode step.

        Returns:
          New tokens of each request of the step: one, and one for each draft that was right.
        """
        running, tokens, started = self._decoding
        output = self._result(started)
        self.traffic.drafted(tokens, output.accepted)
        generated = {}
        for row, request in running:
            generated[request] = output.tokens[row, : 1 + output.accepted[row]].tolist()
            request.drafts = [] if output.drafts is None else output.drafts[row].tolist()
            for index in range(len(generated[request])):
                _add_logprob(request, output, row, index)
        return generated

    def _start(self, op: Op, batch: Any, requests: list[Request], **flags: bool) -> StepOutput:
        """Starts a step; its output is asynchronous."""
        sampled = any(r.params.temperature > 0 for r in requests)
        logprobs = any(r.params.logprobs is not None for r in requests)
        output: StepOutput = self.programs.run(op, batch, sampled=sampled, logprobs=logprobs, **flags)
        return output

    def _result(self, output: StepOutput) -> StepOutput:
        output = self.programs.fetched(output)
        self.traffic.add(output.stats, self.config.num_moe_layers)
        return output

    def rebalance(self, measured: dict[str, np.ndarray] | None = None) -> Move:
        """Places the experts again (EPLB) by their load, between two steps.

        Args:
          measured: Number of times that each expert was chosen, `[L, E]` by stack; None: what this instance
            measured since the last time.

        Raises:
          CmxError: The experts do not fill the layout's slots.
        """
        c, programs = self.config, self.programs
        measured = self.traffic.load if measured is None else measured
        load = load_of(measured, programs.placement, c.n_routed_experts)
        after = balanced(load, c, self.layout)
        report = describe(load, programs.placement, after, c, self.layout)
        programs.run(Op.RELOCATE, after)
        self.traffic.load.clear()
        return report

    def _page_table(self, size: int, rows: list[int], requests: list[Request], pages: int) -> np.ndarray:
        table = np.full((size, pages), NO_PAGE, np.int32)
        for row, request in zip(rows, requests, strict=True):
            ids = self.allocator.places[request].pages[:pages]
            table[row, : len(ids)] = ids
        return table

    def take_pages(self, requests: list[Request], receivers: list[int], ranks: int) -> list[Any]:
        """Copies the filled pages of requests to the host.

        Args:
          requests: Requests placed here.
          receivers: Decode rank that each request goes to. Of the ranks that share sequences or matrices, and
            so hold the same pages, the one that `mapping.prefill_tp_rank` names sends.
          ranks: Number of data ranks of the decode instance.

        Returns:
          Pages of each request, `[pages, L, W, C]`, as the cache keeps them.
        """
        counts = [pages_for(len(r.prefill_tokens), self.capacity.page_width) for r in requests]
        ids, slots = self._page_ids(requests, counts)
        pages = self.programs.run(Op.TAKE_PAGES, ids)
        senders = [
            prefill_tp_rank(
                receiver,
                0,
                prefill_tp_size=self.layout.sequence_ranks * self.layout.tensor_ranks,
                decode_tp_size=1,
                decode_dp_size=ranks,
            )
            for receiver in receivers
        ]
        for sender in senders:
            self.traffic.sent[sender] = self.traffic.sent.get(sender, 0) + 1
        leaves, tree = jax.tree.flatten(pages)
        npu = self.layout.ranks_per_npu
        copies = zip(*(_copied(leaf, slots, senders, npu) for leaf in leaves), strict=True)
        return [jax.tree.unflatten(tree, copy) for copy in copies]

    def put_pages(self, requests: list[Request], pages: list[Any]) -> None:
        """Puts pages copied from another instance into the first pages of each placed request."""
        ids, slots = self._page_ids(requests, [len(jax.tree.leaves(p)[0]) for p in pages])

        def gather(cached: Any, *parts: np.ndarray) -> np.ndarray:
            array = np.zeros((ids.size, *cached.shape[1:]), cached.dtype)
            for slot, part in zip(slots, parts, strict=True):
                array[slot] = part
            return array

        gathered = jax.tree.map(gather, self.programs.cache.pages, *pages)
        self.programs.run(Op.PUT_PAGES, (ids, gathered))

    def _page_ids(self, requests: list[Request], counts: list[int]) -> tuple[np.ndarray, list[list[int]]]:
        """Returns the ids of the first `counts` pages of each request, and their indices in that array.

        Each rank has equally many ids in the array, one rank after the other; `NO_PAGE` fills the rest.
        """
        by_rank: list[list[int]] = [[] for _ in self.allocator.pools]
        spans: list[tuple[int, range]] = []
        for request, count in zip(requests, counts, strict=True):
            place = self.allocator.places[request]
            start = len(by_rank[place.rank])
            by_rank[place.rank] += place.pages[:count]
            spans.append((place.rank, range(start, start + count)))
        length = bucket(max(len(ids) for ids in by_rank), 1)
        array = np.full((len(by_rank), length), NO_PAGE, np.int32)
        for rank, ids in enumerate(by_rank):
            array[rank, : len(ids)] = ids
        return array.reshape(-1), [[rank * length + i for i in span] for rank, span in spans]

    def _message_bytes(self) -> tuple[int, int]:
        """Returns the bytes of a dispatched and of a combined message."""
        combine = self.programs.dtype if self.layout.wire == "float32" else "bfloat16"
        width, wire = self.config.hidden_size, self.layout.wire
        return message_bytes(width, wire), width * jnp.dtype(combine).itemsize

    def payload_bytes(self) -> tuple[int, int]:
        """Returns the bytes of all messages that were dispatched and combined, without empty mailbox rows."""
        dispatch, combine = self._message_bytes()
        return self.traffic.messages * dispatch, self.traffic.messages * combine

    def exchange_bytes(self) -> dict[str, object]:
        """Returns `Traffic.report` of this instance."""
        return self.traffic.report(self.layout.ranks, *self._message_bytes())


def _add_logprob(request: Request, output: StepOutput, row: int, index: int) -> None:
    """Appends the log-probability of a token to its request, if the request asks for them."""
    if request.params.logprobs is not None:
        logprobs, count = output.logprobs, request.params.logprobs
        tokens, top = logprobs.tokens[row, index, :count], logprobs.top[row, index, :count]
        pairs = list(zip(tokens.tolist(), top.tolist(), strict=True))
        request.logprobs.append(TokenLogprob(float(logprobs.chosen[row, index]), pairs))


def _copied(pages: Any, slots: list[list[int]], senders: list[int], ranks_per_npu: int) -> list[np.ndarray]:
    """Returns the pages at each list of slots on the host, from the copy on its sender's device.

    Pages of ranks in several processes are on the host already, as one array.
    """
    if isinstance(pages, np.ndarray):
        return [pages[slot] for slot in slots]
    copies: dict[int, list[Any]] = {}  # by the first row that a rank holds
    for shard in pages.addressable_shards:
        copies.setdefault(shard.index[0].start or 0, []).append(shard.data)
    taken = []
    for slot, sender in zip(slots, senders, strict=True):
        start = max(first for first in copies if first <= slot[0])
        shards = copies[start]
        taken.append(np.asarray(shards[sender // ranks_per_npu % len(shards)])[[row - start for row in slot]])
    return taken
