"""Expert placement against DeepSeek's own outputs (goldens by scripts/make_eplb.py), and its properties."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support import GOLDENS

from cmx_jax.errors import CmxError
from cmx_jax.mesh.eplb import balancedness, rebalance_experts

GOLDEN = np.load(GOLDENS / "eplb.npz")
CASES = sorted(name.removesuffix("_weight") for name in GOLDEN.files if name.endswith("_weight"))


@pytest.mark.parametrize("case", CASES)
def test_placements_equal_deepseeks(case: str) -> None:
    placed = rebalance_experts(GOLDEN[f"{case}_weight"], *map(int, GOLDEN[f"{case}_sizes"]))
    for name in ("phy2log", "log2phy", "logcnt"):
        np.testing.assert_array_equal(getattr(placed, name), GOLDEN[f"{case}_{name}"], err_msg=name)


sizes = st.sampled_from(
    [(12, 16, 4, 2, 8), (16, 24, 1, 1, 8), (16, 32, 8, 4, 16), (8, 8, 2, 2, 4), (9, 12, 3, 2, 6)]
)


@given(sizes, st.integers(0, 2**32 - 1))
@settings(deadline=None, max_examples=60)
def test_placement_lists_are_consistent(size: tuple[int, ...], seed: int) -> None:
    """Every expert has its slots and every slot an expert."""
    experts, slots, groups, nodes, ranks = size
    load = np.random.default_rng(seed).pareto(1.0, (3, experts))
    placed = rebalance_experts(load, slots, groups, nodes, ranks)
    assert placed.phy2log.shape == (3, slots)
    for layer in range(3):
        for expert in range(experts):
            expected = np.flatnonzero(placed.phy2log[layer] == expert)
            listed = placed.log2phy[layer, expert]
            np.testing.assert_array_equal(np.sort(listed[listed >= 0]), expected)
            assert len(expected) == placed.logcnt[layer, expert] >= 1
    if groups % nodes == 0:  # the experts of a group lie on one node
        node = np.arange(slots) // (slots // nodes)
        for layer in range(3):
            group = placed.phy2log[layer] // (experts // groups)
            assert all(len(set(node[group == g])) == 1 for g in range(groups))


@given(st.integers(0, 2**32 - 1))
@settings(deadline=None, max_examples=30)
def test_balancedness_equals_a_loop_and_improves(seed: int) -> None:
    rng = np.random.default_rng(seed)
    load = rng.pareto(1.0, (2, 32))
    placed = rebalance_experts(load, 48, 1, 1, 16)
    after = balancedness(load, placed.phy2log, placed.logcnt, 16)
    for layer in range(2):
        by_rank = np.zeros(16)
        for slot, expert in enumerate(placed.phy2log[layer]):
            by_rank[slot // 3] += load[layer, expert] / placed.logcnt[layer, expert]
        assert after[layer] == pytest.approx(by_rank.mean() / by_rank.max())
    plain = np.tile(np.where(np.arange(48) % 3 < 2, np.arange(48) // 3 * 2 + np.arange(48) % 3, -1), (2, 1))
    before = balancedness(load, plain, np.ones((2, 32), int), 16)
    assert (after >= before - 1e-9).all()


@pytest.mark.parametrize(
    ("weight", "sizes", "words"),
    [
        (np.ones((1, 8)), (9, 1, 1, 4), "num_replicas is 9"),
        (np.ones((1, 8)), (4, 1, 1, 4), "at least the 8 experts"),
        (np.ones((1, 8)), (8, 4, 2, 3), "num_gpus is 3"),
        (np.ones((1, 10)), (12, 4, 2, 4), "experts is 10"),
        (np.ones(8), (8, 1, 1, 4), "[8]"),
        (np.full((1, 8), np.nan), (8, 1, 1, 4), "NaN"),
        (-np.ones((1, 8)), (8, 1, 1, 4), "negative"),
        (np.ones((1, 8)), (8, 1, 1, 0), "num_gpus is 0"),
    ],
)
def test_wrong_arguments_are_refused(weight: np.ndarray, sizes: tuple[int, ...], words: str) -> None:
    with pytest.raises(CmxError, match=words.replace("[", r"\[")):
        rebalance_experts(weight, *sizes)
