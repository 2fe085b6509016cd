"""The experts' grouped SwiGLU: empty rows cost nothing, may hold anything and give zeros."""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from cmx_jax.model.layers import grouped_swiglu
from cmx_jax.model.weights import Experts

WIDTH, HIDDEN = 6, 5
LAYER = jnp.int32(1)
CALLS = {"jit": "jaxpr", "custom_vmap_call": "call", "custom_jvp_call": "call_jaxpr"}
_grouped = jax.jit(grouped_swiglu)


def experts(*shape: int) -> Experts:
    """Random experts of three layers."""
    rng = np.random.default_rng(0)
    gate_up = rng.normal(size=(*shape, 3, WIDTH, 2, HIDDEN))
    down = rng.normal(size=(*shape, 3, HIDDEN, WIDTH))
    return Experts(jnp.asarray(gate_up, jnp.float32), jnp.asarray(down, jnp.float32))


def mail(group: np.ndarray) -> jax.Array:
    """Random rows; those of group -1 hold NaN."""
    rows = np.random.default_rng(1).normal(size=(*group.shape, WIDTH))
    return jnp.asarray(np.where(group[..., None] < 0, np.nan, rows), jnp.float32)


def row_by_row(x: jax.Array, group: np.ndarray, w: Experts, layer: int) -> np.ndarray:
    y = np.zeros(x.shape)
    for n, g in enumerate(group):
        if g >= 0:
            gate, up = np.einsum("d,dgf->gf", np.asarray(x[n], np.float64), w.gate_up[g, layer])
            y[n] = (gate / (1 + np.exp(-gate)) * up) @ np.asarray(w.down[g, layer], np.float64)
    return y


def check(group: np.ndarray, w: Experts, layer: int = 1) -> None:
    x = mail(group)
    y = np.asarray(_grouped(x, jnp.asarray(group), w, jnp.int32(layer)))
    np.testing.assert_allclose(y, row_by_row(x, group, w, layer), rtol=1e-5, atol=1e-5)
    assert not y[group < 0].any()


@given(hnp.arrays(np.int32, 24, elements=st.integers(-1, 2)), st.integers(0, 2))
@settings(deadline=None, max_examples=60)
def test_grouped_swiglu_equals_a_loop_over_rows(group: np.ndarray, layer: int) -> None:
    check(group, experts(3), layer)


@pytest.mark.parametrize(
    ("rows", "groups"),
    [(1, 1), (7, 40), (700, 4), (700, 40)],
    ids=["one", "few", "full tiles", "many groups"],
)
@pytest.mark.parametrize("present", [0.0, 0.2, 1.0])
def test_grouped_swiglu_of_few_and_many_rows(rows: int, groups: int, present: float) -> None:
    rng = np.random.default_rng(rows + groups)
    group = np.where(rng.random(rows) < present, rng.integers(0, groups, rows), -1)
    check(group.astype(np.int32), experts(groups))


def nest(lanes: jax.Array) -> jax.Array:
    return lanes.reshape(2, 3, *lanes.shape[1:])


@pytest.mark.parametrize("own_experts", [True, False], ids=["own experts", "common experts"])
@pytest.mark.parametrize("nested", [False, True])
def test_lanes_equal_each_lane_alone(own_experts: bool, nested: bool) -> None:
    group = np.random.default_rng(2).integers(-1, 4, size=(6, 20)).astype(np.int32)
    w, axes = (experts(6, 4), 0) if own_experts else (experts(4), None)
    inputs: Any = (mail(group), jnp.asarray(group), w)
    lanes = jax.vmap(grouped_swiglu, (0, 0, axes, None))
    if nested:
        lanes = jax.vmap(lanes, (0, 0, axes, None))
        inputs = (*map(nest, inputs[:2]), jax.tree.map(nest, w) if own_experts else w)
    y = lanes(*inputs, LAYER).reshape(*group.shape, WIDTH)
    for lane in range(6):
        alone = jax.tree.map(lambda a, i=lane: a[i], w) if own_experts else w
        expected = row_by_row(mail(group)[lane], group[lane], alone, 1)
        np.testing.assert_allclose(y[lane], expected, rtol=1e-5, atol=1e-5)


def products(program: Any, *args: Any) -> tuple[int, list[Any]]:
    """Runs a jaxpr operation by operation: how many products its matmuls took, and its results."""
    env = dict(zip(program.jaxpr.constvars, program.consts, strict=True))
    env.update(zip(program.jaxpr.invars, args, strict=True))
    total = 0
    for eqn in program.jaxpr.eqns:
        values = [atom.val if hasattr(atom, "val") else env[atom] for atom in eqn.invars]
        name, params, count = eqn.primitive.name, eqn.params, 0
        if name == "while":
            count, results = loop_products(params, values)
        elif name in CALLS:
            count, results = products(params[CALLS[name]], *values)
        else:
            results = eqn.primitive.bind(*values, **params)
            results = results if eqn.primitive.multiple_results else [results]
        if name == "dot_general":
            [[contracted, _], _] = params["dimension_numbers"]
            count = results[0].size * math.prod(values[0].shape[axis] for axis in contracted)
        total += count
        env.update(zip(eqn.outvars, results, strict=True))
    return total, [atom.val if hasattr(atom, "val") else env[atom] for atom in program.jaxpr.outvars]


def loop_products(params: dict[str, Any], values: list[Any]) -> tuple[int, list[Any]]:
    c, b = params["cond_nconsts"], params["body_nconsts"]
    known, body, carry, total = values[:c], values[c : c + b], values[c + b :], 0
    while products(params["cond_jaxpr"], *known, *carry)[1][0]:
        count, carry = products(params["body_jaxpr"], *body, *carry)
        total += count
    return total, carry


def rows_paid(group: np.ndarray, w: Experts, fn: Callable[..., jax.Array] = grouped_swiglu) -> float:
    """The work done, in rows of SwiGLU."""
    args = (mail(group), jnp.asarray(group), w, LAYER)
    count, [y] = products(jax.make_jaxpr(fn)(*args), *jax.tree.leaves(args))
    np.testing.assert_allclose(y, jax.jit(fn)(*args), rtol=1e-5, atol=1e-5)
    return count / (3 * WIDTH * HIDDEN)


def some(rows: int, present: int, groups: int) -> np.ndarray:
    """`present` real rows among empty ones."""
    rng = np.random.default_rng(0)
    group = np.full(rows, -1, np.int32)
    group[rng.permutation(rows)[:present]] = rng.integers(0, groups, present)
    return group


@pytest.mark.slow
def test_empty_rows_cost_nothing() -> None:
    assert rows_paid(some(512, 0, 64), experts(64)) == 0
    few = [np.append(some(64, 40, 64), np.full(empty, -1, np.int32)) for empty in (0, 448)]
    assert len({rows_paid(group, experts(64)) for group in few}) == 1


@pytest.mark.parametrize("present", [1, 5, 40])
def test_single_row_costs_at_most_eight(present: int) -> None:
    """Eight rows make the smallest tile, eight tiles a step of the loop."""
    assert present <= rows_paid(some(512, present, 64), experts(64)) <= 8 * present + 64


def test_rows_of_one_expert_share_tiles() -> None:
    assert 1000 <= rows_paid(some(1024, 1000, 4), experts(4)) <= 1.6 * 1000


def test_idle_lanes_cost_nothing() -> None:
    group = np.full((12, 64), -1, np.int32)
    group[7] = some(64, 40, 4)
    lanes = jax.vmap(grouped_swiglu, in_axes=(0, 0, 0, None))
    assert rows_paid(group, experts(12, 4), lanes) == rows_paid(group[7], experts(4))
