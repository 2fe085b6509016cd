"""Allocation against closed forms; switches against table 11."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cmx_jax.analysis.calc.allocation import (
    Assumptions,
    allocation,
    allocation_rate,
    block_sizes,
    render,
    switches,
)
from cmx_jax.errors import CmxError


@given(st.integers(0, 9), st.floats(0, 1))
def test_sizes_have_the_mean(power: int, part: float) -> None:
    mean = 1 + part * (2**power - 1)
    sizes, likely = block_sizes(mean, 2**power)
    assert likely.sum() == pytest.approx(1)
    assert (sizes * likely).sum() == pytest.approx(mean, rel=1e-6)
    assert (likely >= 0).all()


@pytest.mark.parametrize("fit", ["best", "first"])
@pytest.mark.parametrize(
    ("supernode", "mean", "largest", "expected"),
    [(384, 1, 1, 1.0), (384, 128, 128, 1.0), (224, 128, 128, 128 / 224), (192, 64, 64, 1.0)],
)
def test_equal_blocks_leave_the_remainder_free(supernode, mean, largest, expected, fit) -> None:
    rate = allocation_rate(supernode, mean, largest=largest, fit=fit, supernodes=4, blocks=6000)
    assert rate == pytest.approx(expected)


def test_supernode_of_two_npus_matches_the_markov_chain() -> None:
    """Blocks of 1 and 2, as often. States: 1 and 1; 1 while a 2 waits; 2. With d the share of the last:
    d / 4, d / 2 and d, of which the second leaves one free."""
    d = 1 / (1 + 1 / 4 + 1 / 2)
    expected = d / 4 + d + d / 2 / 2
    rates = [
        allocation_rate(2, 1.5, largest=2, supernodes=1, blocks=30000, seed=seed, fit=fit)
        for seed in range(3)
        for fit in ("best", "first")
    ]
    assert np.mean(rates) == pytest.approx(expected, abs=0.003)


def test_larger_supernodes_are_fuller() -> None:
    rates = [allocation_rate(size, 10.08) for size in (384, 288, 192)]
    assert rates == sorted(rates, reverse=True)
    assert rates[0] > 0.94  # figure 24


def test_switches_are_those_of_table_11() -> None:
    published = {384: (56, 100), 352: (56, 92), 288: (42, 100), 256: (42, 89), 192: (28, 100)}
    for npus, (count, use) in published.items():
        switch_count, port_use = switches(npus)
        assert (switch_count, round(100 * port_use)) == (count, use)


def test_render_marks_unmet_bounds() -> None:
    result = allocation([384, 224], [10.08, 11.28], Assumptions(blocks=6000))
    text = render(result)
    assert text.count("not met") == sum(r.met is False for r in result.rates)
    assert "56 switches, 100%" in text


@pytest.mark.parametrize(
    ("supernode", "mean", "options", "message"),
    [
        (0, 10, {}, "supernodes of 0 NPUs, expected at least one that holds the largest block"),
        (64, 10, {}, "supernodes of 64 NPUs, expected"),
        (384, 0.5, {}, "the mean block is 0.5 NPUs, expected 1 to the largest, 128"),
        (384, float("nan"), {}, "the mean block is nan"),
        (384, 10, {"largest": 100}, "the largest block is 100 NPUs, expected a power of two"),
        (384, 10, {"fit": "worst"}, "fit is 'worst', expected best or first"),
        (384, 10, {"blocks": 0}, "blocks is 0"),
        (384, 10, {"blocks": 9}, "9 blocks do not fill 14 supernodes"),
    ],
)
def test_allocation_rate_with_nonsense(supernode, mean, options, message) -> None:
    with pytest.raises(CmxError, match=message):
        allocation_rate(supernode, mean, **options)


def test_switches_without_whole_nodes() -> None:
    with pytest.raises(CmxError, match="a supernode of 100 NPUs, expected whole nodes of 8"):
        switches(100)
