"""Keys stay where they are when a server comes or goes, but for its own share."""

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from serving.ems.stores import key

from cmx_jax.errors import CmxError
from cmx_jax.serving.ems import Ring

KEYS = [key(n) for n in range(4000)]
NAMES = st.lists(st.text(min_size=1, max_size=12), min_size=2, max_size=12, unique=True)


@settings(max_examples=25, deadline=None)
@given(NAMES)
@pytest.mark.slow
def test_ring_added_server(names: list[str]) -> None:
    """An added server takes its share of the keys, and no other key moves."""
    *before, new = names
    small, large = Ring(before), Ring(names)
    moved = [(small.server(k), large.server(k)) for k in KEYS if small.server(k) != large.server(k)]
    assert {to for _, to in moved} == {new}
    assert 0.6 < len(moved) / len(KEYS) * len(names) < 1.6


@settings(max_examples=10, deadline=None)
@given(NAMES)
def test_ring_server_order(names: list[str]) -> None:
    """The order of the servers does not matter."""
    forth, back = Ring(names), Ring(names[::-1])
    assert all(forth.server(k) == back.server(k) for k in KEYS[:200])


def test_ring_shares() -> None:
    """The servers' shares of the keys are similar."""
    shares = Counter(map(Ring(f"node{i}" for i in range(48)).server, KEYS))
    mean = len(KEYS) / 48
    assert len(shares) == 48
    assert max(shares.values()) < 1.7 * mean
    assert min(shares.values()) > 0.5 * mean


@pytest.mark.parametrize(("names", "listed"), [([], "none"), (["a", "b", "a"], "a, b, a")])
def test_ring_invalid_servers(names: list[str], listed: str) -> None:
    """An empty list of servers and duplicate names are refused."""
    with pytest.raises(CmxError, match=f"servers {listed}, expected"):
        Ring(names)
