"""The router against a loop over one token's experts, for any biases, groups and scalings."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from cmx_jax.model.config import ModelConfig
from cmx_jax.model.gate import route
from model.small import config

EXPERTS, TOKENS = 16, 4
SHAPES = ((1, 1, 4), (4, 2, 4), (4, 4, 1), (8, 3, 5))  # n_group, topk_group, num_experts_per_tok
LEAD = 1e-5  # less could be chosen differently in float32

routed = jax.jit(route, static_argnums=3)


def small(groups: int = 4, kept: int = 2, top_k: int = 4, **changes: object) -> ModelConfig:
    return config(n_group=groups, topk_group=kept, num_experts_per_tok=top_k, **changes)


def run(logits: np.ndarray, bias: np.ndarray, c: ModelConfig) -> tuple[np.ndarray, np.ndarray]:
    """Routes tokens that have exactly these logits [T, E]: token t is the t-th unit vector."""
    x = np.eye(TOKENS, dtype=np.float32)
    routing = routed(x, logits.T.astype(np.float32), bias.astype(np.float32), c)
    return np.asarray(routing.experts), np.asarray(routing.weights)


def best(values: dict[int, float], k: int) -> list[int]:
    """The `k` keys of the largest values, best first; the example is dropped if the last is too close."""
    order = sorted(values, key=lambda key: -values[key])
    for i in range(min(k, len(order) - 1)):
        assume(values[order[i]] - values[order[i + 1]] > LEAD)
    return order[:k]


def oracle(logits: np.ndarray, bias: np.ndarray, c: ModelConfig) -> tuple[list[int], np.ndarray]:
    """Experts and weights of one token, in float64."""
    scores = 1 / (1 + np.exp(-logits.astype(np.float64)))
    choice = scores + bias
    size = EXPERTS // c.n_group
    members = {g: range(g * size, (g + 1) * size) for g in range(c.n_group)}
    worth = {g: sum(sorted(choice[e] for e in group)[-2:]) for g, group in members.items()}
    kept = best(worth, c.topk_group) if c.n_group > 1 else [0]
    experts = best({e: choice[e] for g in kept for e in members[g]}, c.num_experts_per_tok)
    weights = scores[experts]
    if c.norm_topk_prob:
        weights = weights / weights.sum()
    return experts, weights * c.routed_scaling_factor


@given(
    st.integers(0, 2**32 - 1),
    st.sampled_from(SHAPES),
    st.booleans(),
    st.sampled_from([0.0, -3.0, 3.0]),
)
@settings(deadline=None, max_examples=60)
def test_routing_equals_the_loop(seed, shape, norm, shift) -> None:
    rng = np.random.default_rng(seed)
    logits = rng.normal(0, 2, (TOKENS, EXPERTS)).astype(np.float32)
    bias = (rng.uniform(-1, 1, EXPERTS) + shift).astype(np.float32)
    c = small(*shape, norm_topk_prob=norm, routed_scaling_factor=1.7)
    experts, weights = run(logits, bias, c)
    for t in range(TOKENS):
        chosen, weighed = oracle(logits[t], bias, c)
        assert experts[t].tolist() == chosen
        np.testing.assert_allclose(weights[t], weighed, rtol=1e-5)


def test_experts_of_masked_groups_are_never_chosen() -> None:
    """Masked with zero instead of -inf, they would win."""
    logits = np.full((TOKENS, EXPERTS), -4.0, np.float32)
    logits[:, 8:12] = np.arange(4)
    experts, _ = run(logits, np.full(EXPERTS, -5.0), small(4, 1, 4))
    np.testing.assert_array_equal(experts, np.broadcast_to([11, 10, 9, 8], (TOKENS, 4)))


def test_group_is_worth_its_two_best_experts() -> None:
    logits = np.full((TOKENS, EXPERTS), -4.0, np.float32)
    logits[:, 0] = 6.0  # the single best expert, but in a poor group
    logits[:, 4:6] = 2.0
    logits[:, 6:8] = 1.0
    experts, _ = run(logits, np.zeros(EXPERTS), small(4, 1, 4))
    assert all(set(row) == {4, 5, 6, 7} for row in experts.tolist())


def test_bias_selects() -> None:
    bias = np.zeros(EXPERTS)
    bias[[3, 7, 11, 15]] = 2.0
    experts, _ = run(np.zeros((TOKENS, EXPERTS)), bias, small(1, 1, 4))
    np.testing.assert_array_equal(experts, np.broadcast_to([3, 7, 11, 15], (TOKENS, 4)))


@given(st.integers(0, 2**32 - 1), st.sampled_from([-4.0, -0.5, 0.5, 4.0]))
@settings(deadline=None, max_examples=30)
def test_bias_does_not_weigh(seed: int, bias: float) -> None:
    logits = np.random.default_rng(seed).normal(0, 2, (TOKENS, EXPERTS)).astype(np.float32)
    c = small(1, 1, EXPERTS)  # all are chosen, so that only their weights can change
    weights = []
    for b in (np.zeros(EXPERTS), bias * np.arange(EXPERTS)):
        experts, unsorted = run(logits, b, c)
        weights.append(np.take_along_axis(unsorted, experts.argsort(axis=1), axis=1))
    np.testing.assert_allclose(weights[0], weights[1], rtol=1e-6)


@pytest.mark.parametrize("top_k", [1, 4])
def test_normalised_weights_sum_to_the_scaling_factor(top_k: int) -> None:
    logits = np.random.default_rng(0).normal(0, 2, (TOKENS, EXPERTS))
    c = small(top_k=top_k, routed_scaling_factor=2.5)
    _, weights = run(logits, np.zeros(EXPERTS), c)
    np.testing.assert_allclose(weights.sum(axis=1), 2.5, rtol=1e-6)


def test_weights_of_vanishing_scores_are_zero() -> None:
    _, weights = run(np.full((TOKENS, EXPERTS), -200.0), np.zeros(EXPERTS), small())
    np.testing.assert_array_equal(weights, 0)


def test_tokens_in_bfloat16_are_scored_in_float32() -> None:
    rng = np.random.default_rng(3)
    x, router = rng.normal(size=(TOKENS, 64)), rng.normal(size=(EXPERTS, 64)).astype(np.float32)
    narrow = jnp.asarray(x, jnp.bfloat16)
    c, bias = small(), np.zeros(EXPERTS, np.float32)
    result, expected = routed(narrow, router, bias, c), routed(narrow.astype(jnp.float32), router, bias, c)
    np.testing.assert_array_equal(result.experts, expected.experts)
    np.testing.assert_array_equal(result.weights, expected.weights)
    assert result.weights.dtype == jnp.float32
