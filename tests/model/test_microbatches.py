"""Microbatches (sections 4.2.3 and 4.3.2): no stream waits for another one's exchange, and values stay equal.

Whether attention of one half *may* overlap with dispatch and experts of the other can be read from the
program: the dependencies of each collective, computed by following the halves of the batch through the traced
step.
"""

from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import MTP_GOLDENS

from cmx_jax.analysis.trace.abstract_steps import trace_step
from cmx_jax.mesh.lanes import Lanes
from cmx_jax.mesh.layout import expert_parallel
from cmx_jax.model import decoder
from cmx_jax.model.batch import DecodeBatch, PrefillBatch
from cmx_jax.model.cache import PagedCache
from cmx_jax.model.checkpoint import read_weights
from cmx_jax.model.families import preset
from cmx_jax.model.sampling import Sampling
from cmx_jax.model.steps import compile_steps
from cmx_jax.serving.deploy.model import Model
from model.dataflow import NONE, WHOLE, Collective, collectives

CASE = MTP_GOLDENS / "yarn"
C = Model.read(CASE).config
WIDE = replace(C, num_attention_heads=48)  # that 16 ranks can share


def of_step(c: Any, step: str, ranks: int, microbatches: int, **fields: Any) -> list[Collective]:
    """The collectives of a step with worst-case mailboxes."""
    drafts = {name: fields.pop(name) for name in ("drafts",) if name in fields}
    layout = expert_parallel(ranks, c.n_routed_experts, microbatches=microbatches, mailbox_rows=0, **fields)
    traced = trace_step(c, layout, step, sequences=4, context=256, length=96, **drafts)
    batch = len(jax.tree.leaves(traced.args_info[0][2]))
    inputs = len(traced.jaxpr.jaxpr.invars)
    rows = WHOLE if microbatches > 1 else frozenset({0})
    start = [NONE] * (inputs - batch) + [rows] * batch
    return collectives(traced.jaxpr.jaxpr, start, microbatches)[1]


def in_layers(calls: list[Collective]) -> list[Collective]:
    return [c for c in calls if {"scan", "while"} & set(c.inside)]


FLAT, TIERS = {"exchange": "flat"}, {"exchange": "hierarchical"}
DRAFTS, SHARED = {"drafts": 2}, {"share_sequences": True}


@pytest.mark.parametrize("exchange", [FLAT, TIERS], ids=["flat", "hierarchical"])
@pytest.mark.parametrize(
    ("step", "fields"),
    [
        ("decode", {}),
        ("decode", DRAFTS),
        ("prefill", DRAFTS),
        ("prefill", SHARED),
        ("prefill", SHARED | DRAFTS),
    ],
)
@pytest.mark.slow
def test_collectives_wait_for_no_other_stream(step, fields, exchange) -> None:
    one, two = (of_step(WIDE, step, 16, parts, **fields, **exchange) for parts in (1, 2))
    assert {c.streams for c in one} == {frozenset({0})}
    counts = Counter((c.name, c.inside) for c in one)
    for stream in (0, 1):  # each has all collectives of the whole step
        assert Counter((c.name, c.inside) for c in two if c.streams == {stream}) == counts
    assert len(two) == 2 * len(one)
    # directly in the layers' loop: within a round of it they may run in any order
    assert {c.inside[-1] for c in in_layers(two)} == {"scan"}
    moved = [c for c in in_layers(two) if c.name == "all_to_all" and c.streams == {0}]
    heads = 2 if "share_sequences" in fields else 0  # in the loops of dense layers and of the others
    assert len(moved) == (2 if exchange == FLAT else 4) + heads


def test_collectives_of_deepseek_r1_wait_for_no_other_stream() -> None:
    calls = in_layers(of_step(preset("deepseek-r1"), "decode", 160, 2, wire="int8", drafts=1))
    assert Counter((c.name, c.streams) for c in calls) == {("all_to_all", frozenset({i})): 2 for i in (0, 1)}


def by_values(one: jax.Array, other: jax.Array) -> list[jax.Array]:
    return [one, other + 0 * one]


def by_barrier(one: jax.Array, other: jax.Array) -> list[jax.Array]:
    return jax.lax.optimization_barrier([one, other])


def by_rounds(one: jax.Array, other: jax.Array) -> list[jax.Array]:
    return [one, jax.lax.fori_loop(0, jnp.argmax(one), lambda _, x: x * 2, other)]


@pytest.mark.parametrize("couple", [by_values, by_barrier, by_rounds])
def test_dependent_streams_are_detected(couple: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The analysis itself, on a decoder whose streams are not independent."""
    layer = decoder.layer
    monkeypatch.setattr(decoder, "layer", lambda xs, *rest: layer(couple(*xs), *rest))
    assert frozenset({0, 1}) in {c.streams for c in in_layers(of_step(C, "decode", 16, 2))}


RANKS, ROWS, WIDTH, PAGES = 2, 4, 4, 3  # rows of a rank, tokens of a page, pages of a row


def both(step: str, batch: Any) -> Iterator[Any]:
    """Cache and output of a step, in one stream and in two."""
    weights = jax.device_put(read_weights(CASE, C, np.float32))
    shape = (RANKS * ROWS * PAGES, C.num_hidden_layers + 1, WIDTH, C.row_dim)
    pages = np.random.default_rng(1).normal(size=shape).astype(np.float32)
    for parts in (1, 2):
        layout = expert_parallel(RANKS, C.n_routed_experts, microbatches=parts, mailbox_rows=0)
        steps = compile_steps(C, layout, Lanes(layout.axes), mtp=True)
        flags = {"cached": True} if step == "prefill" else {}
        yield getattr(steps, step)(weights, PagedCache(pages), batch, sampled=False, **flags)


def check_equal(one: Any, two: Any) -> None:
    """But for the number of rounds: each stream has one."""
    (cache, out), (other_cache, other_out) = one, two
    np.testing.assert_allclose(cache.pages, other_cache.pages, atol=2e-5, rtol=0)
    np.testing.assert_array_equal(2 * out.stats.exchange.rounds, other_out.stats.exchange.rounds)
    for name in ("tokens", "accepted", "drafts"):
        np.testing.assert_array_equal(getattr(out, name), getattr(other_out, name))
    np.testing.assert_array_equal(out.stats.load, other_out.stats.load)


def greedy(*shape: int) -> Sampling:
    zeros = np.zeros(shape, np.int32)
    return Sampling(zeros.astype(np.float32), zeros, np.ones(shape, np.float32), zeros.astype(np.uint32))


PAGES_OF = np.random.default_rng(2).permutation(ROWS * PAGES).reshape(ROWS, PAGES).astype(np.int32)
TABLE = np.concatenate([PAGES_OF] * RANKS)


@pytest.mark.slow
def test_decode_in_two_streams_equals_one() -> None:
    """One row is empty, one has no draft, the others have one."""
    rng = np.random.default_rng(3)
    tokens = rng.integers(0, C.vocab_size, (RANKS * ROWS, 2)).astype(np.int32)
    tokens[3, 1] = -1
    positions = np.array([5, 0, -1, 9, 3, 10, 7, 1], np.int32)
    check_equal(*both("decode", DecodeBatch(tokens, positions, TABLE, greedy(RANKS * ROWS))))


@pytest.mark.slow
def test_prefill_in_two_streams_equals_one() -> None:
    """Chunks of all lengths after cached rows; one row is empty."""
    rng = np.random.default_rng(4)
    rows, length = RANKS * ROWS, 6
    tokens, following = rng.integers(0, C.vocab_size, (2, rows, length)).astype(np.int32)
    cached, new = np.array([0, 4, 0, 3, 6, 1, 2, 0])[:, None], np.array([6, 2, 0, 1, 5, 6, 3, 4])[:, None]
    index = np.arange(length)[None]
    positions = np.where(index < new, cached + index, -1).astype(np.int32)
    last, lengths = (new - 1).astype(np.int32), np.where(new > 0, cached + new, 0).astype(np.int32)
    begin = np.zeros_like(tokens)
    batch = PrefillBatch(tokens, positions, begin, following, TABLE, last, lengths, greedy(rows, 1))
    check_equal(*both("prefill", batch))
