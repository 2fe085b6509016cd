"""`assert_same` accepts right sharded programs and describes planted mistakes."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from cmx_jax.errors import CmxError
from cmx_jax.testing import assert_same

AXES = {"dp": 2, "tp": 3}
SPECS = P("dp"), {"up": P(None, "tp"), "down": P("tp")}


@pytest.fixture
def mesh() -> Mesh:
    return jax.make_mesh(
        tuple(AXES.values()),
        tuple(AXES),
        axis_types=(jax.sharding.AxisType.Auto,) * 2,
        devices=jax.devices()[:6],
    )


def arguments(dtype: Any = np.float32) -> tuple[Any, ...]:
    rng = np.random.default_rng(3)
    shapes = {"up": (5, 12), "down": (12, 4)}
    weights = {name: rng.standard_normal(shape).astype(dtype) for name, shape in shapes.items()}
    return rng.standard_normal((4, 5)).astype(dtype), weights


def dense(x: jax.Array, w: dict[str, jax.Array]) -> jax.Array:
    return jax.nn.gelu(x @ w["up"]) @ w["down"]


def mapped(fn: Any, mesh: Mesh, out_specs: Any = None) -> Any:
    return jax.shard_map(
        fn, mesh=mesh, in_specs=SPECS, out_specs=P("dp") if out_specs is None else out_specs, check_vma=False
    )


def summed(x: jax.Array, w: dict[str, jax.Array]) -> jax.Array:
    return lax.psum(dense(x, w), "tp")


def test_split_by_the_compiler_is_the_same(mesh) -> None:
    assert_same(dense, AXES, SPECS, arguments())
    assert_same(dense, mesh, SPECS, arguments(jnp.bfloat16))


def test_tensor_parallel_program_is_the_same(mesh) -> None:
    assert_same(dense, mesh, SPECS, arguments(), sharded=mapped(summed, mesh))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda x, w: dense(x, w), r"result: device \d \(dp=\d, tp=\d\) has .* at \[\d, \d\], dense .*; "),
        (lambda x, w: 3 * summed(x, w), "all are 3 times the dense ones, the size of 'tp': summed once too"),
        (lambda x, w: summed(x, w) / 6, "all are 1/6 of the dense ones, the size of 'dp' and 'tp'"),
        (lambda x, w: lax.psum(dense(x, w), "dp"), "result: device"),
        (
            lambda x, w: summed(x, w) + lax.axis_index("tp").astype(x.dtype) * 1e-2,
            r"result: device \d \(dp=\d, tp=2\) has",
        ),
        (lambda x, w: jnp.where(lax.axis_index("dp") == 1, jnp.nan, summed(x, w)), r"dp=1, tp=\d\) has nan"),
    ],
    ids=["missing sum", "thrice", "a sixth", "other axis", "ranks disagree", "nan"],
)
def test_wrong_result_names_device_and_element(mesh, wrong, message) -> None:
    with pytest.raises(AssertionError, match=message):
        assert_same(dense, mesh, SPECS, arguments(), sharded=mapped(wrong, mesh), grad=False)


def test_wrong_gradient_names_its_argument_and_factor(mesh) -> None:
    """The value is right; the gradient of one weight is summed over the ranks once too often."""

    @jax.custom_vjp
    def twice(w: jax.Array) -> jax.Array:
        return w

    twice.defvjp(lambda w: (w, None), lambda _, g: (lax.psum(g, "dp"),))

    def wrong(x: jax.Array, w: dict[str, jax.Array]) -> jax.Array:
        return summed(x, w | {"up": twice(w["up"])})

    with pytest.raises(AssertionError, match=r"gradient of argument\[1\]\['up'\]: .*all are 2 times"):
        assert_same(dense, mesh, SPECS, arguments(), sharded=mapped(wrong, mesh))


def test_integer_arguments_and_results_are_compared_exactly() -> None:
    def count(ids: jax.Array, table: jax.Array) -> tuple[jax.Array, jax.Array]:
        return table[ids], jnp.bincount(ids, length=4)

    ids, table = np.array([0, 1, 1, 3, 2, 0]), np.ones((4, 2), np.float32)
    assert_same(count, AXES, (P("tp"), P()), (ids, table))
    with pytest.raises(AssertionError, match=r"result\[1\]: device 0 \(dp=0, tp=0\) has 3 at \[0\], dense 2"):
        assert_same(
            count,
            AXES,
            (P("tp"), P()),
            (ids, table),
            sharded=lambda i, t: (t[i], jnp.bincount(i, length=4).at[0].add(1)),
        )


def test_results_of_other_shapes_and_few_devices_are_refused() -> None:
    with pytest.raises(AssertionError, match=r"result: sharded float32\[\], dense float32\[4, 2\]"):
        assert_same(jnp.sin, AXES, (P("dp"),), (np.ones((4, 2), np.float32),), sharded=jnp.sum)
    with pytest.raises(CmxError, match="needs 1000 devices, there are"):
        assert_same(jnp.sin, {"x": 1000}, (P("x"),), (np.ones(1000),))
