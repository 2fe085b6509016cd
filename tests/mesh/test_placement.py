"""Placements of the paper's sizes, and the even and repeatable choice of replicas."""

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
def test_decode_instance_has_256_routed_32_redundant_32_shared_slots(ranks: int) -> None:
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
def test_ranks_without_whole_nodes_are_balanced_globally(ranks: int) -> None:
    layout = expert_parallel(ranks, EXPERTS, redundant_slots=-EXPERTS % ranks)
    table = place(zipf(), layout, top_k=TOP_K, groups=8)
    assert (replicas(table, EXPERTS) >= 1).all()


def test_prefill_instance_has_ten_experts_per_die() -> None:
    """1 shared (on every rank, outside the slots), 8 routed, 1 redundant; DeepSeek's own placement."""
    layout = expert_parallel(32, EXPERTS, redundant_slots=32)
    assert layout.slots_per_rank == 9
    table = place(zipf(), layout, top_k=TOP_K, groups=8)
    np.testing.assert_array_equal(table, rebalance_experts(zipf(), 288, 8, 4, 32).phy2log)


@pytest.mark.parametrize(("shared_slots", "shared_experts"), [(0, 0), (32, 1), (32, 2)])
def test_measured_load_is_balanced_better_than_unknown_load(shared_slots: int, shared_experts: int) -> None:
    layout = expert_parallel(160, EXPERTS, redundant_slots=64 - shared_slots, shared_slots=shared_slots)
    load, known = zipf(), {"top_k": TOP_K, "shared_experts": shared_experts}
    every = np.repeat(load.sum(axis=1, keepdims=True) / TOP_K, shared_experts, axis=1)
    total = np.concatenate([load, every], axis=1)
    before, after = (
        balancedness(total, table, replicas(table, EXPERTS + shared_experts), 160)
        for table in (place(np.ones_like(load), layout, **known), place(load, layout, **known))
    )
    assert (after > 1.5 * before).all()


@given(st.data())
@settings(deadline=None, max_examples=60)
def test_slot_table_lists_the_slots_of_each_expert(data: st.DataObject) -> None:
    experts, slots = data.draw(st.integers(1, 9)), data.draw(st.integers(1, 20))
    choices = st.lists(st.integers(-1, experts - 1), min_size=slots, max_size=slots)
    table = np.array(data.draw(st.lists(choices, min_size=1, max_size=3)), np.int32)
    slots_by_expert, first = slot_table(table, experts)
    for layer, row in enumerate(table):
        for expert in range(experts):
            listed = slots_by_expert[layer, first[layer, expert] : first[layer, expert + 1]]
            assert listed.tolist() == np.flatnonzero(row == expert).tolist()


@pytest.mark.parametrize("kind", ["lanes", "devices"])
def test_choose_slots_deals_tokens_evenly(kind: str) -> None:
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
    assigned = np.asarray(program(chosen, slots, first))
    np.testing.assert_array_equal(assigned < 0, chosen < 0)
    np.testing.assert_array_equal(table[assigned][chosen >= 0], chosen[chosen >= 0])
    counts = np.stack([np.bincount(f[f >= 0], minlength=16) for f in assigned.reshape(ranks, -1)])
    for expert in range(experts):
        tokens_of_slot = counts[:, table == expert]
        assert (tokens_of_slot.max(axis=1) - tokens_of_slot.min(axis=1) <= 1).all()
    lone = np.zeros((ranks, 1), np.int32)
    slot = np.asarray(program(lone, slots, first)).ravel()
    dealt = np.bincount(slot, minlength=16)[table == 0]
    assert dealt.max() - dealt.min() <= 1
    np.testing.assert_array_equal(np.asarray(program(chosen, slots, first)), assigned)


def test_choose_slots_reaches_the_computed_balancedness() -> None:
    """Tokens are drawn by a load and dealt to replicas: the ranks get loads as `balancedness` says."""
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


def test_count_moved() -> None:
    """Counts slots whose expert comes from another rank."""
    before = np.array([[0, 1, 2, 3]])
    assert count_moved(before, before, 2) == 0
    assert count_moved(before, np.array([[1, 0, 3, 2]]), 2) == 0
    assert count_moved(before, np.array([[0, 2, 2, -1]]), 2) == 1


def test_spread_evenly_without_replicas() -> None:
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
def test_place_with_wrong_number_of_slots_is_refused(ranks, experts, fields, shared_experts, message) -> None:
    layout = expert_parallel(ranks, experts, **fields)
    with pytest.raises(CmxError, match=message):
        place(np.ones((1, experts)), layout, top_k=2, shared_experts=shared_experts)


def test_choose_slots_has_no_collective() -> None:
    traced = jax.make_jaxpr(lambda e, s, f: choose_slots(e, s, f, "ep", True), axis_env=[("ep", 8)])(
        np.zeros((3, 2), np.int32), np.zeros(16, np.int32), np.zeros(6, np.int32)
    )
    assert not {"all_to_all", "psum", "all_gather"} & {e.primitive.name for e in traced.jaxpr.eqns}
