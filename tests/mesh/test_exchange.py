"""Every message reaches its expert and returns, by every method and routing, in the fewest rounds."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from cmx_jax.errors import CmxError
from cmx_jax.mesh.exchange import EXCHANGES, exchange, worst_case_rows
from mesh.coded import (
    TOKENS,
    TOP_K,
    WORST,
    Routing,
    by_hand,
    coded,
    holes,
    longest_queue,
    no_messages,
    one_expert,
    one_rank,
    program,
    uniform,
    zipf,
)


@pytest.mark.parametrize("routing", [uniform, zipf, holes, one_expert, one_rank, no_messages])
@pytest.mark.parametrize("rows", [1, 2, WORST])
@pytest.mark.parametrize(
    ("kind", "ranks", "slots_per_rank"),
    [
        *(("lanes", 8, 4), ("lanes", 320, 1), ("lanes", 384, 2)),
        *(("devices", 8, 4), ("devices", 16, 1), ("devices", 160, 2)),
    ],
)
@pytest.mark.slow
def test_mailbox_results_are_exact(
    kind: str, ranks: int, slots_per_rank: int, rows: int, routing: Routing
) -> None:
    """Tokens return from their experts in as many rounds as the longest queue needs."""
    slots = routing(ranks, slots_per_rank, np.random.default_rng(0))
    x, weights = coded(slots, ranks)
    y, rounds, sent = program(kind, (("ep", ranks),), "ep", slots_per_rank, rows)(x, slots, weights)
    np.testing.assert_array_equal(y, by_hand(x, slots, weights))
    np.testing.assert_array_equal(sent, (slots >= 0).reshape(ranks, -1).sum(1))
    needed = 1 if rows == WORST else -(-longest_queue(slots, ranks, slots_per_rank) // rows)
    assert set(np.asarray(rounds).tolist()) == {needed}


def test_sums_do_not_depend_on_runner_or_rounds() -> None:
    rng = np.random.default_rng(0)
    slots = np.argsort(rng.random((8 * TOKENS, 8 * 2)), axis=1)[:, :8].astype(np.int32)
    x, weights = (rng.normal(size=(len(slots), n)).astype(np.float32) for n in (64, 8))
    results = [
        np.asarray(program(kind, (("ep", 8),), "ep", 2, rows)(x, slots, weights)[0])
        for kind in ("lanes", "devices")
        for rows in (1, WORST)
    ]
    np.testing.assert_allclose(results[0], by_hand(x, slots, weights), rtol=1e-5, atol=1e-4)
    for other in results[1:]:
        np.testing.assert_array_equal(other, results[0])


@pytest.mark.parametrize("kind", ["lanes", "devices"])
@pytest.mark.parametrize("method", sorted(EXCHANGES.keys() - {"ragged"}))
@pytest.mark.parametrize("axis", [("node", "npu"), ("npu", "node")])
@pytest.mark.slow
def test_two_axes_in_either_order(kind: str, method: str, axis: tuple[str, str]) -> None:
    """The ranks of two mesh axes are numbered as one line."""
    slots = holes(8, 4, np.random.default_rng(1))
    x, weights = coded(slots, 8)
    y, rounds, _ = program(kind, (("node", 4), ("npu", 2)), axis, 4, 1, method)(x, slots, weights)
    np.testing.assert_array_equal(y, by_hand(x, slots, weights))
    assert set(np.asarray(rounds).tolist()) == {1 if method == "allgather" else longest_queue(slots, 8, 4)}


@pytest.mark.parametrize("routing", [uniform, zipf, holes, one_expert, one_rank, no_messages])
@pytest.mark.parametrize(
    ("kind", "ranks", "slots_per_rank"),
    [("lanes", 8, 4), ("lanes", 384, 2), ("devices", 8, 1), ("devices", 160, 2)],
)
def test_allgather_results_are_exact_in_one_round(
    kind: str, ranks: int, slots_per_rank: int, routing: Routing
) -> None:
    slots = routing(ranks, slots_per_rank, np.random.default_rng(0))
    x, weights = coded(slots, ranks)
    unused = np.where(slots < 0, np.float32(np.nan), weights)
    y, rounds, sent = program(kind, (("ep", ranks),), "ep", slots_per_rank, 1, "allgather")(x, slots, unused)
    np.testing.assert_array_equal(y, by_hand(x, slots, weights))
    np.testing.assert_array_equal(sent, (slots >= 0).reshape(ranks, -1).sum(1))
    assert set(np.asarray(rounds).tolist()) == {1}


@pytest.mark.parametrize("routing", [zipf, holes, one_expert, one_rank])
@pytest.mark.parametrize(("kind", "nodes"), [("lanes", 48), ("devices", 20)])
def test_hierarchical_results_are_exact(kind: str, nodes: int, routing: Routing) -> None:
    """The whole supernode as lanes, the decode instance as devices: 8 NPUs a node."""
    slots = routing(8 * nodes, 2, np.random.default_rng(0))
    x, weights = coded(slots, 8 * nodes)
    axes = (("node", nodes), ("npu", 8))
    y, rounds, sent = program(kind, axes, ("node", "npu"), 2, 1, "hierarchical")(x, slots, weights)
    np.testing.assert_array_equal(y, by_hand(x, slots, weights))
    np.testing.assert_array_equal(sent, (slots >= 0).reshape(8 * nodes, -1).sum(1))
    assert set(np.asarray(rounds).tolist()) == {longest_queue(slots, 8 * nodes, 2)}


@pytest.mark.parametrize("kind", ["lanes", "devices"])
def test_groups_of_ranks_have_rounds_of_their_own(kind: str) -> None:
    busy, idle = one_rank(4, 2, np.random.default_rng(0)), no_messages(4, 2, np.random.default_rng(0))
    slots = np.concatenate([idle, busy])
    x, weights = coded(slots, 8)
    y, rounds, _ = program(kind, (("dp", 2), ("ep", 4)), "ep", 2, 1)(x, slots, weights)
    np.testing.assert_array_equal(y, by_hand(x, slots, weights))
    assert np.asarray(rounds).tolist() == [0] * 4 + [TOKENS * TOP_K] * 4


@pytest.mark.parametrize("rows", [1, WORST])
def test_weights_of_unused_slots_are_ignored(rows: int) -> None:
    slots = holes(8, 4, np.random.default_rng(0))
    x, weights = coded(slots, 8)
    unused = np.where(slots < 0, np.float32(np.nan), weights)
    y, *_ = program("lanes", (("ep", 8),), "ep", 4, rows)(x, slots, unused)
    np.testing.assert_array_equal(y, by_hand(x, slots, weights))


@given(st.sampled_from([(1, 2, 3, 2, 1), (3, 1, 2, 2, 1), (4, 2, 3, 3, 2), (5, 3, 4, 2, WORST)]), st.data())
@settings(deadline=None, max_examples=150)
def test_exchange_is_exact_for_any_routing(
    shape: tuple[int, int, int, int, int], data: st.DataObject
) -> None:
    ranks, slots_per_rank, tokens, top_k, rows = shape
    choices = st.integers(-1, ranks * slots_per_rank - 1)
    slots = data.draw(hnp.arrays(np.int32, (ranks * tokens, top_k), elements=choices))
    for k in range(1, top_k):  # a token chooses an expert once
        slots[(slots[:, k : k + 1] == slots[:, :k]).any(1), k] = -1
    numbers = st.integers(-100, 100).map(float)
    x = data.draw(hnp.arrays(np.float32, (len(slots), 2), elements=numbers))
    x[(slots < 0).all(1)] = np.nan
    weights = data.draw(hnp.arrays(np.float32, slots.shape, elements=numbers))
    y, rounds, sent = program("lanes", (("ep", ranks),), "ep", slots_per_rank, rows)(x, slots, weights)
    np.testing.assert_array_equal(y, by_hand(x, slots, weights))
    np.testing.assert_array_equal(sent, (slots >= 0).reshape(ranks, -1).sum(1))
    longest = longest_queue(slots, ranks, slots_per_rank)
    assert longest <= worst_case_rows(tokens, top_k, slots_per_rank)
    assert set(np.asarray(rounds).tolist()) == {1 if rows == WORST else -(-longest // rows)}


def test_unknown_method_is_refused() -> None:
    with pytest.raises(CmxError, match="exchange 'post' is unknown, expected one of"):
        exchange("post")
