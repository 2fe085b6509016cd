"""Prefill and decode of a whole model: tokens against the dense reference, caches against each other."""

from dataclasses import dataclass, replace
from typing import Any

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from reference.dense import greedy
from support import BASE

from cmx_jax.mesh.lanes import Lanes
from cmx_jax.mesh.layout import expert_parallel
from cmx_jax.mesh.runners import make_runner
from cmx_jax.model.batch import DecodeBatch, PrefillBatch
from cmx_jax.model.cache import NO_PAGE, PagedCache
from cmx_jax.model.checkpoint import read_weights
from cmx_jax.model.config import ModelConfig
from cmx_jax.model.sampling import Sampling
from cmx_jax.model.steps import Steps, compile_steps
from model.small import config

C = config()
RANKS, ROWS = 2, 4  # two rows a rank
WIDTH, HELD, PAGES = 4, 4, 11  # tokens of a page, pages of a sequence, pages of a rank
NEW = 8
PROMPTS = [np.random.default_rng(9).integers(0, C.vocab_size, length).tolist() for length in (6, 7, 1, 3)]


@pytest.fixture(scope="module")
def expected() -> list[list[int]]:
    return [greedy(BASE, prompt, NEW) for prompt in PROMPTS]


@pytest.fixture(scope="module")
def machine() -> "Machine":
    layout = expert_parallel(RANKS, C.n_routed_experts)
    weights = read_weights(BASE, C, np.float32)
    steps = compile_steps(C, layout, Lanes(layout.axes), mtp=False)
    return Machine(steps, jax.device_put(weights))


def sampling(temperature: float) -> Sampling:
    """Row b draws with seed b."""
    return Sampling(
        temperature=np.full(ROWS, temperature, np.float32),
        top_k=np.zeros(ROWS, np.int32),
        top_p=np.ones(ROWS, np.float32),
        seed=np.arange(ROWS, dtype=np.uint32),
    )


def table_of(orders: list[list[int]]) -> np.ndarray:
    """The pages of each row, the first ones of its rank's order."""
    rows = ROWS // RANKS
    return np.concatenate([np.array(o[: rows * HELD], np.int32).reshape(rows, HELD) for o in orders])


IN_ORDER = table_of([list(range(PAGES))] * RANKS)
tables = st.lists(st.permutations(range(PAGES)), min_size=RANKS, max_size=RANKS).map(table_of)


def stale() -> PagedCache:
    shape = (RANKS * PAGES, C.num_hidden_layers, WIDTH, C.row_dim)
    return PagedCache(np.full(shape, np.nan, np.float32))


def ids_of(table: np.ndarray) -> np.ndarray:
    """Rows of the whole array of pages [B, pages]: those of rank r begin at `r * PAGES`."""
    return table + np.repeat(np.arange(RANKS) * PAGES, ROWS // RANKS)[:, None]


@dataclass
class Machine:
    """The compiled steps with lists as arguments; greedy unless `temperature` is above 0."""

    steps: Steps
    weights: Any
    temperature: float = 0.0

    def prefill(self, cache: PagedCache, table: np.ndarray, prompts: list[list[int]]) -> tuple[Any, Any]:
        tokens, lengths = (
            np.zeros((ROWS, 8), np.int32),
            np.array([len(prompt) for prompt in prompts], np.int32),
        )
        for row, prompt in enumerate(prompts):
            tokens[row, : len(prompt)] = prompt
        index = np.broadcast_to(np.arange(8, dtype=np.int32), tokens.shape)
        positions = np.where(index < lengths[:, None], index, -1)
        last = lengths[:, None] - 1
        params = jax.tree.map(lambda a: a[:, None], sampling(self.temperature))
        batch = PrefillBatch(
            tokens, positions, tokens * 0, tokens * 0 - 1, table[:, : 8 // WIDTH], last, last + 1, params
        )
        cache, out = self.steps.prefill(
            self.weights, cache, batch, sampled=self.temperature > 0, cached=False
        )
        return cache, out.replace(tokens=out.tokens[:, 0])

    def decode(self, cache: PagedCache, table: np.ndarray, tokens: Any, positions: Any) -> tuple[Any, Any]:
        tokens, positions = np.array(tokens, np.int32), np.array(positions, np.int32)
        batch = DecodeBatch(tokens[:, None], positions, table, sampling(self.temperature))
        cache, out = self.steps.decode(self.weights, cache, batch, sampled=self.temperature > 0)
        return cache, out.replace(tokens=out.tokens[:, 0])

    def go_on(
        self, cache: PagedCache, table: np.ndarray, prompts: list[list[int]], first: Any
    ) -> tuple[list[list[int]], PagedCache]:
        """Decodes NEW tokens for each prompt, `first` included; empty prompts stay empty."""
        texts = [[int(token)] for token in first]
        lengths = np.array([len(prompt) for prompt in prompts])
        for step in range(NEW - 1):
            positions = np.where(lengths > 0, lengths + step, -1)
            cache, out = self.decode(cache, table, [row[-1] for row in texts], positions)
            for row, token in zip(texts, np.asarray(out.tokens), strict=True):
                row.append(int(token))
        return [row if prompt else [] for row, prompt in zip(texts, prompts, strict=True)], cache

    def run(self, table: np.ndarray, prompts: list[list[int]]) -> tuple[list[list[int]], PagedCache]:
        cache, out = self.prefill(stale(), table, prompts)
        return self.go_on(cache, table, prompts, out.tokens)


def rows_of(cache: PagedCache, table: np.ndarray) -> list[np.ndarray]:
    """The cached rows of each sequence in order of position, [L, S, C]; the last new token has none."""
    pages = np.asarray(cache.pages)[ids_of(table)]  # [B, pages, L, W, C]
    rows = pages.transpose(0, 2, 1, 3, 4).reshape(ROWS, C.num_hidden_layers, HELD * WIDTH, C.row_dim)
    return [row[:, : len(prompt) + NEW - 1] for row, prompt in zip(rows, PROMPTS, strict=True)]


def test_programs_are_shared_by_equal_instances() -> None:
    """Configs, layouts and runners compare by value; another value of any of them gives other programs."""

    def compiled(c: ModelConfig, **fields: Any) -> Steps:
        layout = expert_parallel(RANKS, C.n_routed_experts, **fields)
        return compile_steps(c, layout, Lanes(layout.axes), mtp=False)

    steps = compiled(config())
    assert compiled(config()) is steps
    assert compiled(replace(C, rms_norm_eps=1e-5)) is not steps
    assert compiled(config(), microbatches=2) is not steps
    assert compiled(config(), exchange="allgather") is not steps
    layout = expert_parallel(1, C.n_routed_experts)
    on_devices = [compile_steps(C, layout, make_runner("devices", layout.axes), mtp=False) for _ in range(2)]
    assert on_devices[0] is on_devices[1]
    assert compile_steps(C, layout, Lanes(layout.axes), mtp=False) is not on_devices[0]


@pytest.mark.slow
def test_prefill_then_decode_gives_the_tokens_of_the_dense_reference(machine, expected) -> None:
    assert machine.run(IN_ORDER, PROMPTS)[0] == expected


def test_prefill_writes_rows_of_real_tokens_only(machine) -> None:
    cache, _ = machine.prefill(stale(), IN_ORDER, PROMPTS)
    filled = np.isfinite(cache.pages).all(axis=(1, 3))
    expected = np.zeros_like(filled)
    for pages, prompt in zip(ids_of(IN_ORDER), PROMPTS, strict=True):
        for s in range(len(prompt)):
            expected[pages[s // WIDTH], s % WIDTH] = True
    np.testing.assert_array_equal(filled, expected)
    np.testing.assert_array_equal(np.isfinite(cache.pages).any(axis=(1, 3)), expected)


def test_decode_from_the_first_token_on_equals_prefill(machine, expected) -> None:
    cache, first = stale(), [0] * ROWS
    for s in range(max(map(len, PROMPTS))):
        live = [s < len(prompt) for prompt in PROMPTS]
        tokens = [prompt[s] if on else 0 for prompt, on in zip(PROMPTS, live, strict=True)]
        cache, out = machine.decode(cache, IN_ORDER, tokens, [s if on else -1 for on in live])
        first = np.where(live, out.tokens, first)
    tokens, cache = machine.go_on(cache, IN_ORDER, PROMPTS, first)
    assert tokens == expected
    by_prefill = machine.run(IN_ORDER, PROMPTS)[1]
    for one, other in zip(rows_of(cache, IN_ORDER), rows_of(by_prefill, IN_ORDER), strict=True):
        assert np.isfinite(one).all()
        np.testing.assert_allclose(one, other, atol=2e-5, rtol=0)


@given(tables)
@settings(deadline=None, max_examples=10)
def test_tokens_are_independent_of_page_ids(machine, expected, table) -> None:
    """All other pages, and the rows after a sequence's end, hold NaN throughout."""
    tokens, cache = machine.run(table, PROMPTS)
    assert tokens == expected
    used = sum(len(prompt) + NEW - 1 for prompt in PROMPTS) * C.num_hidden_layers * C.row_dim
    assert np.isfinite(cache.pages).sum() == used
    assert all(np.isfinite(row).all() for row in rows_of(cache, table))


@pytest.mark.parametrize("row", range(ROWS))
def test_single_sequence_gives_the_same_tokens_in_any_row(machine, expected, row: int) -> None:
    prompts: list[list[int]] = [[] for _ in range(ROWS)]
    prompts[row] = PROMPTS[1]
    table = np.where(np.arange(ROWS)[:, None] == row, IN_ORDER, NO_PAGE).astype(np.int32)
    tokens, cache = machine.run(table, prompts)
    assert tokens[row] == expected[1]
    written = set(np.flatnonzero(np.isfinite(cache.pages).any(axis=(1, 2, 3))))
    assert written == set(ids_of(IN_ORDER)[row])


@given(tables)
@settings(deadline=None, max_examples=5)
def test_decode_continues_from_moved_pages(machine, expected, table) -> None:
    cache, out = machine.prefill(stale(), IN_ORDER, PROMPTS)
    pages = machine.steps.take_pages(cache, IN_ORDER.reshape(-1))
    moved = machine.steps.put_pages(stale(), table.reshape(-1), np.asarray(pages))
    np.testing.assert_array_equal(
        np.asarray(moved.pages)[ids_of(table)], np.asarray(cache.pages)[ids_of(IN_ORDER)]
    )
    assert machine.go_on(moved, table, PROMPTS, out.tokens)[0] == expected


@pytest.mark.slow
def test_drawn_token_is_the_same_in_prefill_and_decode(machine) -> None:
    hot = replace(machine, temperature=3.0)
    tokens, _ = hot.run(IN_ORDER, PROMPTS)
    assert tokens != machine.run(IN_ORDER, PROMPTS)[0]
    longer = [(prompt + text)[:7] for prompt, text in zip(PROMPTS, tokens, strict=True)]
    _, out = hot.prefill(stale(), IN_ORDER, longer)
    assert out.tokens.tolist() == [(prompt + text)[7] for prompt, text in zip(PROMPTS, tokens, strict=True)]


def test_stats_count_real_tokens_and_no_padding(machine) -> None:
    cache, out = machine.prefill(stale(), IN_ORDER, PROMPTS)
    by_rank = [len(PROMPTS[0]) + len(PROMPTS[1]), len(PROMPTS[2]) + len(PROMPTS[3])]
    top_k, layers = C.num_experts_per_tok, C.num_moe_layers
    for stats, tokens in (
        (out.stats, by_rank),
        (machine.decode(cache, IN_ORDER, [1, 0, 1, 1], [6, -1, 1, 3])[1].stats, [1, 2]),
    ):
        expected = np.broadcast_to(np.array(tokens) * top_k, (layers, RANKS))
        np.testing.assert_array_equal(stats.exchange.sent, expected)
        np.testing.assert_array_equal(np.asarray(stats.load).sum(axis=-1), expected)
