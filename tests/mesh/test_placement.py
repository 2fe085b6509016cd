"""Placements of the paper's shapes; replicas are chosen evenly, always the same; EPLB keeps its promise."""

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import PartitionSpec as P

from cmx_jax.errors import CmxError
from cmx_jax.mesh import make_runner
from cmx_jax.mesh.eplb import balancedness, rebalance_experts
from cmx_jax.mesh.layout import expert_parallel
from cmx_jax.mesh.placement import choose_slots, count_moved, place, replicas, slot_table, spread_evenly

EXPERTS, TOP_K = 256, 8
LAYERS = 2


def zipf(experts: int = EXPERTS, exponent: float = 1.0) -> np.ndarray:
    """Loads of layers whose busiest experts differ."""
    rng = np.random.default_rng(0)
    load = 1e5 / np.arange(1, experts + 1) ** exponent
    return np.stack([rng.permutation(load) for _ in range(LAYERS)]).round()


@pytest.mark.parametrize("ranks", [160, 320])
def test_the_decode_instance_has_256_routed_32_redundant_and_32_shared_slots(ranks: int) -> None:
    layout = expert_parallel(ranks, EXPERTS, redundant_slots=32, shared_slots=32)
    assert (layout.slots, layout.slots_per_rank) == (320, 320 // ranks)
    table = place(zipf(), layout, top_k=TOP_K, shared_experts=1)
    counts = replicas(table, EXPERTS + 1)
    assert (counts[:, EXPERTS] == 32).all()
    assert (counts[:, :EXPERTS] >= 1).all()
    assert (counts[:, :EXPERTS].sum(axis=1) == 288).all()
    by_rank = (table == EXPERTS).reshape(LAYERS, ranks, -1).sum(axis=-1)
    assert by_rank.max() == 1  # no rank has two copies of the same


@pytest.mark.parametrize("ranks", [3, 9, 12, 30])
def test_ranks_that_are_no_whole_nodes_are_balanced_as_one(ranks: int) -> None:
    layout = expert_parallel(ranks, EXPERTS, redundant_slots=-EXPERTS % ranks)
    table = place(zipf(), layout, top_k=TOP_K, groups=8)
    assert (replicas(table, EXPERTS) >= 1).all()


def test_the_prefill_instance_has_ten_experts_a_die() -> None:
    """1 shared (on every rank, outside the slots), 8 routed, 1 redundant; DeepSeek's own placement."""
    layout = expert_parallel(32, EXPERTS, redundant_slots=32)
    assert layout.slots_per_rank == 9
    table = place(zipf(), layout, top_k=TOP_K, groups=8)
    np.testing.assert_array_equal(table, rebalance_experts(zipf(), 288, 8, 4, 32).phy2log)


@pytest.mark.parametrize(("shared_slots", "shared_experts"), [(0, 0), (32, 1), (32, 2)])
def test_a_measured_load_is_spread_better_than_an_unknown_one(shared_slots: int, shared_experts: int) -> None:
    layout = expert_parallel(160, EXPERTS, redundant_slots=64 - shared_slots, shared_slots=shared_slots)
    load, known = zipf(), {"top_k": TOP_K, "shared_experts": shared_experts}
    every = np.repeat(load.sum(axis=1, keepdims=True) / TOP_K, shared_experts, axis=1)
    whole = np.concatenate([load, every], axis=1)
    before, after = (
        balancedness(whole, table, replicas(table, EXPERTS + shared_experts), 160)
        for table in (place(np.ones_like(load), layout, **known), place(load, layout, **known))
    )
    assert (after > 1.5 * before).all()


@given(st.data())
@settings(deadline=None, max_examples=60)
def test_a_slot_table_lists_each_expert_s_slots(data: st.DataObject) -> None:
    experts, slots = data.draw(st.integers(1, 9)), data.draw(st.integers(1, 20))
    choices = st.lists(st.integers(-1, experts - 1), min_size=slots, max_size=slots)
    table = np.array(data.draw(st.lists(choices, min_size=1, max_size=3)), np.int32)
    given_slots, first = slot_table(table, experts)
    for layer, row in enumerate(table):
        for expert in range(experts):
            found = given_slots[layer, first[layer, expert] : first[layer, expert + 1]]
            assert found.tolist() == np.flatnonzero(row == expert).tolist()


@pytest.mark.parametrize("kind", ["lanes", "devices"])
def test_a_rank_deals_its_tokens_out_evenly(kind: str) -> None:
    """Every token gets a slot of its expert; on each rank an expert's slots differ by one token at most, and
    over all ranks too where each has one token."""
    ranks, experts, tokens = 8, 5, 33
    layout = expert_parallel(ranks, experts, redundant_slots=11)
    table = place(zipf(experts), layout, top_k=2)[0]
    slots, first = (a[0] for a in slot_table(table[None], experts))
    rng = np.random.default_rng(3)
    chosen = rng.integers(-1, experts, (ranks * tokens, 2)).astype(np.int32)
    runner = make_runner(kind, layout.axes)
    program = runner.jit(lambda e, s, f: choose_slots(e, s, f, "ep", True), (P("ep"), P(), P()), P("ep"))
    found = np.asarray(program(chosen, slots, first))
    np.testing.assert_array_equal(found < 0, chosen < 0)
    np.testing.assert_array_equal(table[found][chosen >= 0], chosen[chosen >= 0])
    counts = np.stack([np.bincount(f[f >= 0], minlength=16) for f in found.reshape(ranks, -1)])
    for expert in range(experts):
        of = counts[:, table == expert]
        assert (of.max(axis=1) - of.min(axis=1) <= 1).all()
    lone = np.zeros((ranks, 1), np.int32)
    slot = np.asarray(program(lone, slots, first)).ravel()
    dealt = np.bincount(slot, minlength=16)[table == 0]
    assert dealt.max() - dealt.min() <= 1
    np.testing.assert_array_equal(np.asarray(program(chosen, slots, first)), found)


def test_what_was_promised_is_what_arrives() -> None:
    """Tokens drawn by a load, dealt out over replicas: the ranks get what `balancedness` says."""
    layout, rng = expert_parallel(16, 64, redundant_slots=16), np.random.default_rng(0)
    load = np.stack([rng.permutation(1e4 / np.arange(1, 65))])
    chance = load[0] / load.sum()
    chosen = rng.choice(64, (16 * 2048, 1), p=chance).astype(np.int32)
    measured = np.bincount(chosen.ravel(), minlength=64)[None]
    ratios = []
    for table in (place(np.ones_like(load), layout, top_k=1), place(measured, layout, top_k=1)):
        slots, first = (a[0] for a in slot_table(table, 64))
        program = make_runner("lanes", layout.axes).jit(
            lambda e, s, f: choose_slots(e, s, f, "ep", True), (P("ep"), P(), P()), P("ep")
        )
        arrived = np.bincount(np.asarray(program(chosen, slots, first)).ravel() // 5, minlength=16)
        promised = balancedness(measured, table, replicas(table, 64), 16)[0]
        assert arrived.mean() / arrived.max() == pytest.approx(promised, rel=0.01)
        ratios.append(promised)
    assert ratios[1] > 2 * ratios[0]
    assert ratios[1] > 0.95


def test_moved_counts_slots_whose_expert_comes_from_another_rank() -> None:
    before = np.array([[0, 1, 2, 3]])
    assert count_moved(before, before, 2) == 0
    assert count_moved(before, np.array([[1, 0, 3, 2]]), 2) == 0
    assert count_moved(before, np.array([[0, 2, 2, -1]]), 2) == 1


def test_experts_without_replicas_lie_as_before() -> None:
    table = spread_evenly(2, 3, expert_parallel(4, 3))
    assert table.tolist() == [[0, 1, 2, -1]] * 2


@pytest.mark.parametrize(
    ("ranks", "experts", "fields", "shared_experts", "message"),
    [
        (4, 16, {"slots": 24, "redundant_slots": 4}, 0, "expected to fill the 24 slots"),
        (4, 16, {"slots": 20}, 0, "expected to fill the 20 slots"),
        (4, 16, {"redundant_slots": 1, "shared_slots": 3}, 2, "expected a multiple of 2 shared experts"),
        (4, 16, {"redundant_slots": 2, "shared_slots": 2}, 0, "expected a multiple of 0 shared experts"),
    ],
)
def test_slots_that_do_not_fit_are_refused(ranks, experts, fields, shared_experts, message) -> None:
    layout = expert_parallel(ranks, experts, **fields)
    with pytest.raises(CmxError, match=message):
        place(np.ones((1, experts)), layout, top_k=2, shared_experts=shared_experts)


def test_the_program_that_chooses_has_no_collective() -> None:
    traced = jax.make_jaxpr(lambda e, s, f: choose_slots(e, s, f, "ep", True), axis_env=[("ep", 8)])(
        np.zeros((3, 2), np.int32), np.zeros(16, np.int32), np.zeros(6, np.int32)
    )
    assert not {"all_to_all", "psum", "all_gather"} & {e.primitive.name for e in traced.jaxpr.eqns}
