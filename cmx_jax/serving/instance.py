"""One instance: a model on the ranks of a sub-mesh, its cache, and who holds which row and page of it."""

from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from cmx_jax.mesh.exchange import message_bytes
from cmx_jax.mesh.layout import Layout
from cmx_jax.mesh.runners import Runner
from cmx_jax.model.cache import NO_PAGE, PagedCache, abstract_cache
from cmx_jax.model.config import ModelConfig
from cmx_jax.model.moe import MoEStats
from cmx_jax.model.sampling import Sampling
from cmx_jax.model.steps import DecodeBatch, PrefillBatch, StepOutput, compile_steps, step_specs
from cmx_jax.model.weights import Weights
from cmx_jax.serving.pages import PagePool, pages_for
from cmx_jax.serving.request import Request

# A program is compiled for each length, so lengths are few: these many pages, doubled as often as needed.
PREFILL_PAGES = 2
DECODE_PAGES = 8


@dataclass(frozen=True, kw_only=True)
class Capacity:
    """What each rank of an instance has room for."""

    sequences: int = 4  # rows of the decode batch
    pages: int = 64
    page_width: int = 16  # tokens of a page


@dataclass(frozen=True)
class Place:
    """Where a request lies on an instance: its rank, pages there, and row of the decode batch (or None)."""

    rank: int
    pages: list[int]
    row: int | None


@dataclass
class Traffic:
    """What the exchanges of an instance moved, summed over steps."""

    steps: int = 0
    messages: int = 0  # over all layers and ranks
    rounds: int = 0  # over all layers
    most_rounds: int = 0

    def add(self, stats: MoEStats | None) -> None:
        self.steps += 1
        if stats is not None:
            rounds = np.asarray(stats.exchange.rounds)[:, 0]
            self.messages += int(np.asarray(stats.exchange.sent).sum())
            self.rounds += int(rounds.sum())
            self.most_rounds = max(self.most_rounds, int(rounds.max()))


@dataclass
class Instance:
    """Prefill, decode or both on the ranks of one layout.

    `weights` are whole arrays with their experts in the layout's slots.
    """

    name: str
    config: ModelConfig
    layout: Layout
    runner: Runner
    weights: Weights
    capacity: Capacity
    dtype: str = "float32"
    traffic: Traffic = field(default_factory=Traffic)

    def __post_init__(self) -> None:
        c = self.config
        mtp = self.weights.mtp is not None
        self.steps = compile_steps(c, self.layout, self.runner, mtp)
        weight_specs, self._data, _ = step_specs(c, self.layout, mtp)
        self.weights = self.runner.put(self.weights, weight_specs)
        self.reset()

    def reset(self) -> None:
        """Forgets all requests and makes a new cache, as after a step that was broken off."""
        c, ranks = self.config, self.layout.data_ranks
        shape = abstract_cache(c, self.capacity.pages * ranks, self.capacity.page_width, self.dtype).pages
        zeros = np.zeros(shape.shape, shape.dtype)
        self.cache: PagedCache = self.runner.put(PagedCache(zeros), PagedCache(self._data))
        self.pools = [PagePool(self.capacity.pages) for _ in range(ranks)]
        self.rows: list[Request | None] = [None] * (ranks * self.capacity.sequences)
        self.places: dict[Request, Place] = {}

    @property
    def load(self) -> int:
        """Pages in use: what the scheduler balances."""
        return sum(pool.held for pool in self.pools)

    def _row_on(self, rank: int) -> int | None:
        start = rank * self.capacity.sequences
        rows = range(start, start + self.capacity.sequences)
        return next((row for row in rows if self.rows[row] is None), None)

    def place(self, request: Request, tokens: int, decode: bool, taken: frozenset[int] = frozenset()) -> bool:
        """Gives a request pages for `tokens` tokens on the emptiest rank, and a row there if it will decode.

        Args:
          taken: ranks that may not be used.

        Returns:
          False, with nothing changed, if no rank has room.
        """
        need = pages_for(tokens, self.capacity.page_width)
        open_ranks = [
            rank
            for rank, pool in enumerate(self.pools)
            if rank not in taken and pool.free >= need and (not decode or self._row_on(rank) is not None)
        ]
        if not open_ranks:
            return False
        rank = min(open_ranks, key=lambda rank: self.pools[rank].held)
        row = self._row_on(rank) if decode else None
        if row is not None:
            self.rows[row] = request
        self.places[request] = Place(rank, self.pools[rank].take(need), row)
        return True

    def release(self, request: Request) -> None:
        """Takes back all that a request holds."""
        place = self.places.pop(request)
        self.pools[place.rank].give_back(place.pages)
        if place.row is not None:
            self.rows[place.row] = None

    def prefill(self, requests: list[Request]) -> list[int]:
        """Runs the prompts of placed requests, at most one a rank; returns their first tokens."""
        ranks, width = self.layout.data_ranks, self.capacity.page_width
        length = bucket(max(len(r.prompt) for r in requests), PREFILL_PAGES * width)
        row_of = [self.places[r].rank for r in requests]
        tokens, lengths = np.zeros((ranks, length), np.int32), np.zeros(ranks, np.int32)
        for row, request in zip(row_of, requests, strict=True):
            tokens[row, : len(request.prompt)] = request.prompt
            lengths[row] = len(request.prompt)
        table = self._page_table(ranks, row_of, requests, length // width)
        batch = PrefillBatch(tokens, lengths, table, sampling(ranks, row_of, requests))
        return self._run(self.steps.prefill, batch, row_of, requests)

    def decode(self) -> dict[Request, int]:
        """One token for every request that has a row and its first token."""
        running = [(row, r) for row, r in enumerate(self.rows) if r is not None and r.tokens]
        rows, requests = [row for row, _ in running], [r for _, r in running]
        size, width = len(self.rows), self.capacity.page_width
        tokens, positions = np.zeros(size, np.int32), np.full(size, -1, np.int32)
        for row, request in running:
            tokens[row] = request.tokens[-1]
            positions[row] = len(request.prompt) + len(request.tokens) - 1
        longest = bucket(int(positions.max()) + 1, DECODE_PAGES * width)
        table = self._page_table(size, rows, requests, longest // width)
        batch = DecodeBatch(tokens, positions, table, sampling(size, rows, requests))
        return dict(zip(requests, self._run(self.steps.decode, batch, rows, requests), strict=True))

    def _run(self, step: Any, batch: Any, rows: list[int], requests: list[Request]) -> list[int]:
        sampled = any(r.params.temperature > 0 for r in requests)
        batch = self.runner.put(batch, self._data)
        output: StepOutput
        self.cache, output = step(self.weights, self.cache, batch, sampled)
        tokens, stats = jax.device_get((output.tokens, output.stats))
        self.traffic.add(stats)
        return [int(tokens[row]) for row in rows]

    def _page_table(self, size: int, rows: list[int], requests: list[Request], pages: int) -> np.ndarray:
        table = np.full((size, pages), NO_PAGE, np.int32)
        for row, request in zip(rows, requests, strict=True):
            held = self.places[request].pages[:pages]
            table[row, : len(held)] = held
        return table

    def take_pages(self, requests: list[Request]) -> list[np.ndarray]:
        """The filled pages of each request, `[pages, L, W, C + R]`, copied to the host."""
        counts = [pages_for(len(r.prompt), self.capacity.page_width) for r in requests]
        ids, slots = self._page_ids(requests, counts)
        pages = np.asarray(self.steps.take_pages(self.cache, self.runner.put(ids, self._data)))
        return [pages[slot] for slot in slots]

    def put_pages(self, requests: list[Request], pages: list[np.ndarray]) -> None:
        """Puts pages copied from another instance into the first pages of each placed request."""
        ids, slots = self._page_ids(requests, [len(p) for p in pages])
        whole = np.zeros((ids.size, *self.cache.pages.shape[1:]), self.cache.pages.dtype)
        for slot, page in zip(slots, pages, strict=True):
            whole[slot] = page
        ids, placed = self.runner.put((ids, whole), (self._data, self._data))
        self.cache = self.steps.put_pages(self.cache, ids, placed)

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

    def exchange_bytes(self) -> dict[str, float]:
        """Bytes that one rank dispatched and combined in a mean step, and rounds of a mean layer.

        Payload: real messages. The mailboxes around them move more: see `Layout.mailbox_rows`.
        """
        c, t = self.config, self.traffic
        back = jnp.dtype(self.dtype if self.layout.wire == "float32" else "bfloat16").itemsize
        per_rank = t.messages / max(t.steps, 1) / self.layout.ranks
        return {
            "dispatch_bytes": per_rank * message_bytes(c.hidden_size, self.layout.wire),
            "combine_bytes": per_rank * c.hidden_size * back,
            "rounds_mean": t.rounds / max(t.steps * c.num_moe_layers, 1),
            "rounds_most": t.most_rounds,
            "steps": t.steps,
        }


def bucket(count: int, unit: int) -> int:
    """The smallest `unit * 2^n` that holds `count`: few shapes, few programs."""
    size = unit
    while size < count:
        size *= 2
    return size


def sampling(size: int, rows: list[int], requests: list[Request]) -> Sampling:
    """Sampling parameters of each row; rows without a request are greedy."""
    s = Sampling(
        temperature=np.zeros(size, np.float32),
        top_k=np.zeros(size, np.int32),
        top_p=np.ones(size, np.float32),
        seed=np.zeros(size, np.uint32),
    )
    for row, request in zip(rows, requests, strict=True):
        p = request.params
        s.temperature[row], s.top_k[row], s.top_p[row], s.seed[row] = p.temperature, p.top_k, p.top_p, p.seed
    return s
