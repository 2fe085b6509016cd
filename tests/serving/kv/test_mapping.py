"""The paper's mapping of decode ranks to prefill ranks, for the shapes of its instances and for balance."""

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cmx_jax.errors import CmxError
from cmx_jax.serving.kv.mapping import prefill_tp_rank


def senders(prefill_tp: int, decode_tp: int, decode_dp: int) -> list[int]:
    return [
        prefill_tp_rank(
            dp, tp, prefill_tp_size=prefill_tp, decode_tp_size=decode_tp, decode_dp_size=decode_dp
        )
        for dp in range(decode_dp)
        for tp in range(decode_tp)
    ]


def test_prefill_tp_rank_paper_shape() -> None:
    """Section 4.3.3: 32 prefill ranks, no TP in decode, DP320: ratio 32, groups of 10."""
    ranks = senders(32, 1, 320)
    assert ranks[:10] == [0] * 10
    assert ranks[10] == 1
    assert ranks == [rank // 10 for rank in range(320)]


@pytest.mark.parametrize(
    ("prefill_tp", "decode_tp", "decode_dp", "share"),
    [
        (32, 1, 320, 10),
        (16, 1, 160, 10),
        (32, 2, 160, 10),
        (16, 4, 40, 10),
        (32, 1, 144, None),
        (8, 8, 20, 20),
    ],
)
def test_prefill_tp_rank_counts(prefill_tp, decode_tp, decode_dp, share) -> None:
    """Every prefill rank sends to the same number of decode ranks."""
    counts = Counter(senders(prefill_tp, decode_tp, decode_dp))
    assert set(counts) <= set(range(prefill_tp))
    if share is not None:
        assert counts == dict.fromkeys(range(prefill_tp), share)


@given(st.integers(1, 8), st.integers(1, 16), st.integers(1, 30))
@settings(deadline=None)
def test_prefill_tp_rank_divisible(decode_tp, ratio, group) -> None:
    """Divisible shapes are balanced, and senders keep the TP rank."""
    ranks = senders(ratio * decode_tp, decode_tp, ratio * group)
    assert Counter(ranks) == dict.fromkeys(range(ratio * decode_tp), group)
    assert all(sender % decode_tp == i % decode_tp for i, sender in enumerate(ranks))


@given(st.integers(1, 40), st.integers(1, 400))
@settings(deadline=None)
def test_prefill_tp_rank_group_size(prefill_tp, decode_dp) -> None:
    """No rank of any shape sends to more than a group."""
    counts = Counter(senders(prefill_tp, 1, decode_dp))
    assert max(counts.values()) == -(-decode_dp // prefill_tp)
    assert set(counts) <= set(range(prefill_tp))


@pytest.mark.parametrize(
    ("rank", "sizes", "message"),
    [
        ((320, 0), (32, 1, 320), "decode_dp_rank is 320, expected 0 to 319"),
        ((0, 1), (32, 1, 320), "decode_tp_rank is 1, expected 0 to 0"),
        ((0, 0), (32, 3, 320), "prefill_tp_size is 32, expected a multiple of 3"),
    ],
)
def test_prefill_tp_rank_invalid(rank, sizes, message) -> None:
    names = ("prefill_tp_size", "decode_tp_size", "decode_dp_size")
    with pytest.raises(CmxError, match=message):
        prefill_tp_rank(*rank, **dict(zip(names, sizes, strict=True)))
