"""One instance: a model on a sub-mesh, with its paged KV cache."""

import math
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from cmx_jax.mesh.exchange.methods import message_bytes
from cmx_jax.model.cache import NO_PAGE
from cmx_jax.model.rebalance import Move, balanced, describe
from cmx_jax.model.steps import DecodeBatch, StepOutput
from cmx_jax.serving.executor.programs import Programs
from cmx_jax.serving.executor.stats import Traffic
from cmx_jax.serving.kv.mapping import prefill_tp_rank
from cmx_jax.serving.scheduling.allocator import RankAllocator
from cmx_jax.serving.scheduling.packing import bucket, pack, sampling
from cmx_jax.serving.scheduling.pages import pages_for
from cmx_jax.serving.scheduling.request import Request, State, TokenLogprob

# A program is compiled for each length, so lengths are few: these many pages, doubled as often as needed.
PREFILL_PAGES = 2
DECODE_PAGES = 8


@dataclass(eq=False)
class Instance(Programs, RankAllocator):
    """Prefill, decode or both on the ranks of one layout; `computed_tokens` counts what prefill has run."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.traffic = Traffic()
        self.computed_tokens = 0
        RankAllocator.__init__(
            self, self.name, self.capacity, self.layout.data_ranks, self.layout.microbatches
        )

    def reset(self) -> None:
        """Forgets all requests and makes a new cache, as after a step that was broken off."""
        super().reset()
        self.run("empty", ())

    def prefill(self) -> list[Request]:
        """Runs the next chunks of placed prompts; returns those that are through, with their first token and
        drafts."""
        pieces = self.next_pieces()
        unit = math.lcm(PREFILL_PAGES * self.capacity.page_width, self.layout.sequence_ranks)
        packed = pack(pieces, {r: p.pages for r, p in self.places.items()}, self.capacity.page_width, unit)
        requests = [piece.request for row in pieces for piece in row]
        output = self._result(self._start("prefill", packed.batch, requests, cached=packed.cached))
        self.computed_tokens += sum(piece.stop - piece.start for row in pieces for piece in row)
        through = self.prefilled(pieces)
        for request, row, n in through:
            request.next_token = int(output.tokens[row, n])
            request.drafts = [] if output.drafts is None else [int(output.drafts[row, n])]
            _report(request, output, row, n)
        return [request for request, _, _ in through]

    def start_decode(self) -> None:
        """Starts a step for all that have a row and their first token; `end_decode` waits for it."""
        running = [(row, r) for row, r in enumerate(self.rows) if r is not None and r.state is State.DECODE]
        rows, requests = [row for row, _ in running], [r for _, r in running]
        size, width, drafts = len(self.rows), self.capacity.page_width, self.num_speculative_tokens
        tokens, positions = np.full((size, 1 + drafts), -1, np.int32), np.full(size, -1, np.int32)
        for row, request in running:
            known = [request.tokens[-1], *request.drafts]
            tokens[row, : len(known)] = known
            positions[row] = len(request.prompt) + len(request.tokens) - 1
        longest = bucket(int(positions.max()) + 1 + 2 * drafts, DECODE_PAGES * width)
        table = self._page_table(size, rows, requests, longest // width)
        batch = DecodeBatch(tokens, positions, table, sampling(size, rows, requests))
        self._decoding = running, tokens, self._start("decode", batch, requests)

    def end_decode(self) -> dict[Request, list[int]]:
        """Tokens of every request that was in the step: one, and one for each draft that was right."""
        running, tokens, started = self._decoding
        output = self._result(started)
        self.traffic.drafted(tokens, output.accepted)
        found = {}
        for row, request in running:
            found[request] = output.tokens[row, : 1 + output.accepted[row]].tolist()
            request.drafts = [] if output.drafts is None else output.drafts[row].tolist()
            for n in range(len(found[request])):
                _report(request, output, row, n)
        return found

    def _start(self, op: str, batch: Any, requests: list[Request], **flags: bool) -> StepOutput:
        """Starts a step; what it returns may not be there yet."""
        sampled = any(r.params.temperature > 0 for r in requests)
        logprobs = any(r.params.logprobs is not None for r in requests)
        output: StepOutput = self.run(op, batch, sampled=sampled, logprobs=logprobs, **flags)
        return output

    def _result(self, output: StepOutput) -> StepOutput:
        output = self.fetched(output)
        self.traffic.add(output.stats, self.config.num_moe_layers)
        return output

    def rebalance(self) -> Move:
        """EPLB: places the experts anew for the load measured since the last time, between two steps.

        Raises:
          CmxError: the experts do not fill the layout's slots.
        """
        c, load = self.config, self.traffic.load_of(self.placement, self.config.n_routed_experts)
        after = balanced(load, c, self.layout)
        report = describe(load, self.placement, after, c, self.layout)
        self.run("house", after)
        self.traffic.load.clear()
        return report

    def _page_table(self, size: int, rows: list[int], requests: list[Request], pages: int) -> np.ndarray:
        table = np.full((size, pages), NO_PAGE, np.int32)
        for row, request in zip(rows, requests, strict=True):
            held = self.places[request].pages[:pages]
            table[row, : len(held)] = held
        return table

    def take_pages(self, requests: list[Request], receivers: list[int], ranks: int) -> list[Any]:
        """The filled pages of each request, `[pages, L, W, C]` as the cache keeps them, copied to the host.

        Args:
          requests: placed here.
          receivers: the decode rank that each goes to. Of ranks that share sequences or matrices, and so hold
            the same pages, the one that `transfer.prefill_tp_rank` names sends.
          ranks: of the decode instance.
        """
        counts = [pages_for(len(r.prefill_tokens), self.capacity.page_width) for r in requests]
        ids, slots = self._page_ids(requests, counts)
        pages = self.run("take", ids)
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
        taken = zip(*(_copied(leaf, slots, senders) for leaf in leaves), strict=True)
        return [jax.tree.unflatten(tree, of) for of in taken]

    def put_pages(self, requests: list[Request], pages: list[Any]) -> None:
        """Puts pages copied from another instance into the first pages of each placed request."""
        ids, slots = self._page_ids(requests, [len(jax.tree.leaves(p)[0]) for p in pages])

        def whole(held: Any, *parts: np.ndarray) -> np.ndarray:
            array = np.zeros((ids.size, *held.shape[1:]), held.dtype)
            for slot, part in zip(slots, parts, strict=True):
                array[slot] = part
            return array

        moved = jax.tree.map(whole, self.cache.pages, *pages)
        self.run("put", (ids, moved))

    def _page_ids(self, requests: list[Request], counts: list[int]) -> tuple[np.ndarray, list[list[int]]]:
        """Page ids by rank, equally many for each (`NO_PAGE` behind the real ones), and where each
        request's pages stand among them."""
        by_rank: list[list[int]] = [[] for _ in self.pools]
        where: list[tuple[int, range]] = []
        for request, count in zip(requests, counts, strict=True):
            place = self.places[request]
            start = len(by_rank[place.rank])
            by_rank[place.rank] += place.pages[:count]
            where.append((place.rank, range(start, start + count)))
        room = bucket(max(len(ids) for ids in by_rank), 1)
        whole = np.full((len(by_rank), room), NO_PAGE, np.int32)
        for rank, ids in enumerate(by_rank):
            whole[rank, : len(ids)] = ids
        return whole.reshape(-1), [[rank * room + i for i in span] for rank, span in where]

    def exchange_bytes(self) -> dict[str, Any]:
        """What `Traffic.report` says of this instance."""
        back = self.dtype if self.layout.wire == "float32" else "bfloat16"
        width, wire = self.config.hidden_size, self.layout.wire
        sizes = message_bytes(width, wire), width * jnp.dtype(back).itemsize
        return self.traffic.report(self.layout.ranks, *sizes)


def _report(request: Request, output: StepOutput, row: int, n: int) -> None:
    """Notes the logarithms of a token, if the request asks for them."""
    if request.params.logprobs is not None:
        said, count = output.logprobs, request.params.logprobs
        top = zip(said.tokens[row, n, :count].tolist(), said.top[row, n, :count].tolist(), strict=True)
        request.logprobs.append(TokenLogprob(float(said.chosen[row, n]), list(top)))


def _copied(pages: Any, slots: list[list[int]], senders: list[int]) -> list[np.ndarray]:
    """The pages at each slot on the host, from the copy that its sender holds. Of ranks in several processes
    they are on the host already, as one array."""
    if isinstance(pages, np.ndarray):
        return [pages[slot] for slot in slots]
    copies: dict[int, list[Any]] = {}  # by the first row that a rank holds
    for shard in pages.addressable_shards:
        copies.setdefault(shard.index[0].start or 0, []).append(shard.data)
    taken = []
    for slot, sender in zip(slots, senders, strict=True):
        start = max(at for at in copies if at <= slot[0])
        held = copies[start]
        taken.append(np.asarray(held[sender % len(held)])[[row - start for row in slot]])
    return taken
