"""Products with INT8 weights against NumPy's integers: sums are exact, both scales are applied after them."""

import re
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

import cmx_jax.model
from cmx_jax.quant import QTensor, einsum, quantize_rows

SIZES = {
    "b": 2,
    "t": 3,
    "n": 3,
    "d": 7,
    "e": 7,
    "f": 5,
    "g": 2,
    "h": 4,
    "q": 6,
    "c": 5,
    "v": 5,
    "x": 3,
    "r": 2,
    "y": 2,
}
# The products of the model: spec, and how many of the first operand's last axes are summed
SPECS = [
    ("btd,dq->btq", 1),
    ("btq,qhn->bthn", 1),
    ("btd,dyn->btyn", 1),
    ("bthv,hvd->btd", 2),
    ("bte,ed->btd", 1),
    ("...d,dgf->...gf", 1),
    ("...f,fd->...d", 1),
    ("ntd,ndh->nth", 1),
    ("ntf,nfd->ntd", 1),
    ("xgrd,xdhf->xgrhf", 1),
    ("xgrf,xfd->xgrd", 1),
]


def operands(spec: str, summed: int, one: bool = False, seed: int = 0) -> tuple[jax.Array, QTensor]:
    """Activations and an INT8 weight whose scale has length 1 along summed axes; `one`: a single row."""
    rng = np.random.default_rng(seed)
    a, b = spec.split("->")[0].replace("...", "bt").split(",")
    inner = a[-summed:]
    shape = [SIZES[label] if label in inner or (label in b or not one) else 1 for label in a]
    x = rng.standard_normal(shape).astype(np.float32)
    q = rng.integers(-127, 128, [SIZES[label] for label in b], np.int8)
    scales = [1 if label in inner else SIZES[label] for label in b]
    scale = rng.uniform(0.01, 0.1, scales).astype(ml_dtypes.bfloat16)
    return jnp.asarray(x), QTensor(jnp.asarray(q), jnp.asarray(scale))


def expected(spec: str, summed: int, x: jax.Array, w: QTensor) -> np.ndarray:
    """Integers summed as integers, in float64 times the token's scale and the channel's."""
    spec, numbers, scales = spec.replace("...", "bt"), np.asarray(w.q, np.int64), np.asarray(w.scale)
    a, b = spec.split("->")[0].split(",")
    rows = x.reshape(-1, int(np.prod(x.shape[-summed:])))
    q, scale = (np.asarray(part) for part in quantize_rows(rows, jnp.ones(len(rows), bool)))
    total = np.einsum(spec, q.reshape(x.shape).astype(np.int64), numbers)
    assert np.abs(total).max() < 2**24  # which float32 holds exactly
    by_token = np.broadcast_to(scale.reshape(x.shape[:-summed] + (1,) * summed), x.shape)
    by_token = np.einsum(f"{a}->{a[:-summed]}", by_token.astype(np.float64)) / np.prod(x.shape[-summed:])
    ones = np.ones(w.q.shape, np.float64) / np.prod([SIZES[label] for label in a[-summed:]])
    return total * np.einsum(f"{a[:-summed]},{b}->{spec.split('->')[1]}", by_token, ones * scales)


@pytest.mark.parametrize("one", [False, True], ids=["rows", "row"])
@pytest.mark.parametrize(("spec", "summed"), SPECS)
@pytest.mark.slow
def test_integers_are_summed_exactly_and_scaled_afterwards(spec: str, summed: int, one: bool) -> None:
    x, w = operands(spec, summed, one)
    got = jax.jit(lambda x, w: einsum(spec, x, w))(x, w)
    assert got.dtype == np.float32
    np.testing.assert_allclose(got, expected(spec, summed, x, w), rtol=1e-6)  # two products in float32


@pytest.mark.parametrize(("spec", "summed"), SPECS)
@pytest.mark.slow
def test_result_is_close_to_that_of_floats(spec: str, summed: int) -> None:
    x, w = operands(spec, summed)
    exact = jnp.einsum(spec, x, w.q.astype(jnp.float32) * w.scale.astype(jnp.float32))
    off = np.asarray(einsum(spec, x, w)) - exact
    assert np.linalg.norm(off) < 0.01 * np.linalg.norm(exact)  # a step is a 127th of a row's largest number


def test_specs_cover_every_product_of_the_model() -> None:
    sources = Path(cmx_jax.model.__file__).parent.glob("*.py")
    used = {spec for path in sources for spec in re.findall(r'(?<![.\w])einsum\("(.+?)"', path.read_text())}
    kinds = {canonical(spec) for spec, _ in SPECS}
    assert used
    assert {spec for spec in used if canonical(spec) not in kinds} == set()


def canonical(spec: str) -> str:
    """Renames the letters of a spec in the order of their appearance."""
    order = list(dict.fromkeys(re.findall("[a-z]", spec)))
    return "".join(chr(97 + order.index(x)) if x.isalpha() else x for x in spec)


@pytest.mark.parametrize(("spec", "summed"), [s for s in SPECS if s[0].startswith(("...", "n"))])
def test_invalid_rows_may_hold_nan(spec: str, summed: int) -> None:
    x, w = operands(spec, summed)
    valid = jnp.asarray(np.random.default_rng(1).random(x.shape[:-summed]) < 0.5)
    assert 0 < valid.sum() < valid.size
    stale = jnp.where(valid[..., None], x, np.nan)
    got, clean = np.asarray(einsum(spec, stale, w, valid)), np.asarray(einsum(spec, x, w))
    np.testing.assert_array_equal(got[valid], clean[valid])
    assert not got[~valid].any()


def test_row_does_not_depend_on_other_rows() -> None:
    """A single row goes through another kernel; only the compiler's order of scaling may differ."""
    x, w = operands("btd,dq->btq", 1)
    batch = np.asarray(einsum("btd,dq->btq", x, w))
    for b, t in np.ndindex(x.shape[:2]):
        one = einsum("btd,dq->btq", x[b : b + 1, t : t + 1], w)
        np.testing.assert_allclose(one[0, 0], batch[b, t], rtol=1e-6)


def test_lanes_equal_single_products() -> None:
    lanes = [operands("ntd,ndh->nth", 1, seed=seed) for seed in range(3)]
    x, w = jax.tree.map(lambda *parts: jnp.stack(parts), *lanes)
    got = jax.vmap(lambda x, w: einsum("ntd,ndh->nth", x, w))(x, w)
    shared = jax.vmap(lambda x: einsum("ntd,ndh->nth", x, lanes[0][1]))(x)
    for lane, (own_x, own_w) in enumerate(lanes):
        np.testing.assert_array_equal(got[lane], einsum("ntd,ndh->nth", own_x, own_w))
        np.testing.assert_array_equal(shared[lane], einsum("ntd,ndh->nth", own_x, lanes[0][1]))


def test_result_has_type_of_activations() -> None:
    x, w = operands("btd,dq->btq", 1)
    low = x.astype(ml_dtypes.bfloat16)
    got = einsum("btd,dq->btq", jnp.asarray(low), w)
    assert got.dtype == jnp.bfloat16
    wide = np.asarray(einsum("btd,dq->btq", jnp.asarray(low.astype(np.float32)), w))
    np.testing.assert_array_equal(got, wide.astype(ml_dtypes.bfloat16))  # rounded once, at the end


@pytest.mark.parametrize("one", [False, True], ids=["rows", "row"])
@pytest.mark.parametrize(("spec", "summed"), SPECS)
def test_only_product_is_int8_into_int32(spec: str, summed: int, one: bool) -> None:
    x, w = operands(spec, summed, one)
    jaxpr: Any = jax.make_jaxpr(lambda x, w: einsum(spec, x, w))(x, w)
    dots = [eqn for eqn in flat(jaxpr.jaxpr) if eqn.primitive.name == "dot_general"]
    types = [[str(v.aval.dtype) for v in (*eqn.invars, *eqn.outvars)] for eqn in dots]
    assert types == [["int8", "int8", "int32"]]


def flat(jaxpr: Any) -> list[Any]:
    """The equations of a jaxpr, and those inside them."""
    inner = [
        eqn for e in jaxpr.eqns for p in e.params.values() if hasattr(p, "jaxpr") for eqn in flat(p.jaxpr)
    ]
    return [*jaxpr.eqns, *inner]


@pytest.mark.parametrize("spec", ["btd,dq->btq", "bdt,dq->btq"])
def test_sums_without_one_scale_are_refused(spec: str) -> None:
    """A scale that varies along the summed axis, and a summed axis that is not the last."""
    x, w = operands("btd,dq->btq", 1)
    if spec == "btd,dq->btq":
        w = w.replace(scale=jnp.ones(w.q.shape, jnp.float32))
    else:
        x = x.transpose(0, 2, 1)
    with pytest.raises(ValueError, match="one must hold along the last axes"):
        einsum(spec, x, w)


def test_floats_are_left_to_jax() -> None:
    x, w = operands("bthv,hvd->btd", 2)
    wide = w.q.astype(jnp.float32)
    got = einsum("bthv,hvd->btd", x, wide)
    np.testing.assert_array_equal(got, jnp.einsum("bthv,hvd->btd", x, wide))
