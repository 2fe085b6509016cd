"""A layout checks itself, and spreads experts evenly over its slots."""

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cmx_jax.errors import CmxError
from cmx_jax.mesh import Layout, expert_parallel

GOOD = Layout(axes=(("node", 4), ("npu", 2)), data=("npu",), experts=("node", "npu"), slots=16)


def test_sizes_follow_from_the_axes() -> None:
    assert (GOOD.ranks, GOOD.data_ranks, GOOD.expert_ranks, GOOD.slots_per_rank) == (8, 2, 8, 2)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"axes": (("node", 4), ("node", 2))}, "axis 'node' is given twice"),
        ({"axes": (("node", 4), ("npu", 0))}, "axis 'npu' has size 0, expected at least 1"),
        ({"data": ("die",)}, "data uses axis 'die', expected one of ['node', 'npu']"),
        ({"experts": ("node", "node")}, "experts uses axis 'node' twice"),
        (
            {"slots": 17},
            "17 expert slots do not divide over 8 ranks, expected equally many on each, such as 24",
        ),
        ({"slots": 0}, "0 expert slots do not divide over 8 ranks, expected equally many on each, such as 8"),
        ({"wire": "fp8"}, "wire 'fp8', expected one of ['float32', 'bfloat16', 'int8']"),
        ({"mailbox_rows": -1}, "mailbox_rows is -1, expected zero or more"),
        ({"exchange": "post"}, "exchange 'post' is unknown, expected one of ['allgather'"),
    ],
)
def test_wrong_field_is_refused_in_one_line(change: dict[str, object], message: str) -> None:
    with pytest.raises(CmxError) as error:
        dataclasses.replace(GOOD, **change)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_more_experts_than_slots_are_refused() -> None:
    with pytest.raises(CmxError, match="17 experts do not fit 16 slots, expected at least as many"):
        GOOD.placement(17)


@pytest.mark.parametrize(("ranks", "slots"), [(1, 256), (16, 256), (160, 320), (320, 320), (384, 384)])
def test_slots_of_256_experts(ranks: int, slots: int) -> None:
    """Experts get the smallest number of slots that is equal on each rank."""
    layout = expert_parallel(ranks, 256)
    assert (layout.slots, layout.slots_per_rank * ranks) == (slots, slots)
    assert (layout.data_ranks, layout.expert_ranks) == (ranks, ranks)


def test_zero_ranks_are_refused() -> None:
    with pytest.raises(CmxError, match="0 ranks, expected at least 1"):
        expert_parallel(0, 256)


@given(st.integers(1, 400), st.integers(1, 8), st.integers(1, 400))
@settings(deadline=None)
def test_placement_is_injective_and_evenly_spread(ranks: int, per_rank: int, experts: int) -> None:
    experts = min(experts, ranks * per_rank)
    layout = expert_parallel(ranks, experts, slots=ranks * per_rank)
    slots = layout.placement(experts)
    assert slots.dtype == np.int32
    assert (np.diff(slots) > 0).all()
    assert slots[0] >= 0
    assert slots[-1] < layout.slots
    load = np.bincount(slots // per_rank, minlength=ranks)
    assert set(load) <= {experts // ranks, -(-experts // ranks)}


@pytest.mark.parametrize(
    ("mailbox_rows", "rows"),
    [
        pytest.param(None, 12, id="twice the mean of 4.8 (5), plus 2"),
        pytest.param(0, 192, id="the worst case: 96 tokens x 2 slots"),
        pytest.param(7, 7, id="as given"),
    ],
)
def test_mailbox_rows_of_96_tokens_with_top_8_on_160_ranks(mailbox_rows: int | None, rows: int) -> None:
    assert expert_parallel(160, 256, mailbox_rows=mailbox_rows).rows(96, 8) == rows


@given(st.integers(1, 96), st.integers(1, 8), st.integers(1, 400), st.integers(1, 16))
@settings(deadline=None)
def test_usual_rows_never_exceed_the_worst_case(tokens: int, top_k: int, ranks: int, per_rank: int) -> None:
    layout = expert_parallel(ranks, 1, slots=ranks * per_rank)
    worst = dataclasses.replace(layout, mailbox_rows=0).rows(tokens, top_k)
    assert 1 <= layout.rows(tokens, top_k) <= worst == tokens * min(top_k, per_rank)
