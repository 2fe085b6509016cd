"""Assertions on the collectives of a function, and the messages of differences."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jax import lax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from cmx_jax.errors import CmxError
from cmx_jax.mesh import make_runner
from cmx_jax.mesh.jax_versions import auto_mesh
from cmx_jax.testing import assert_collectives

MESH = auto_mesh((("a", 2), ("b", 4)))
X = jax.ShapeDtypeStruct((8, 8, 4), jnp.float32)


def mapped(fn: Callable[..., Any]) -> Any:
    return jax.shard_map(fn, mesh=MESH, in_specs=P(("a", "b")), out_specs=P(("a", "b")), check_vma=False)


@mapped
def talk(x: jax.Array) -> jax.Array:
    def body(_: int, x: jax.Array) -> jax.Array:
        return lax.all_to_all(x, "b", 1, 1, tiled=True)

    x = lax.fori_loop(0, 3, body, lax.psum(x, ("a", "b")))
    return lax.psum(lax.all_to_all(x, "a", 1, 1, tiled=True), "b")


@mapped
def until(x: jax.Array) -> jax.Array:
    return lax.while_loop(lambda x: x.sum() < 9, lambda x: lax.psum(x, "a"), x)


@pytest.mark.parametrize(
    ("expected", "allow"),
    [
        ({"all_to_all": 4, "all_reduce": 2}, ()),
        (
            {("all_to_all", "b"): 3, ("all_to_all", "a"): 1, ("all_reduce", ("a", "b")): 1, "all_reduce": 1},
            (),
        ),
        ({("all_to_all", "b"): 3}, ["all_to_all", "all_reduce", "all_gather"]),
        ({"all_to_all": 4, "all_gather": 0}, [("all_reduce", "b"), ("all_reduce", ("a", "b"))]),
    ],
)
def test_expected_and_allowed_collectives_are_accepted(expected: Any, allow: Any) -> None:
    assert_collectives(talk, (X,), expected, allow=allow)


def test_data_dependent_count_is_none() -> None:
    assert_collectives(until, (X,), {"all_reduce": None})
    lines = refused(until, {("all_reduce", "a"): 2})
    assert "all_reduce over a: as often as data decide, expected 2 times" in lines


def test_difference_is_reported_with_table_of_all() -> None:
    lines = refused(talk, {("all_to_all", "b"): 2, "permute": 1}, allow=[("all_reduce", "b")])
    assert lines[: lines.index("found:") + 2] == [
        "collectives of talk (jaxpr)",
        "all_to_all over b: 3 times, expected 2 times",
        "permute: 0 times, expected 1 time",
        "all_reduce: 1 time, expected 0 times",
        "all_to_all: 1 time, expected 0 times",
        "found:",
        "op          axes  plane  operand           count  payload B   wire B  scope",
    ]
    assert sum(line.startswith("all_") for line in lines[6:]) == 4
    assert refused(lambda x: x, {"all_gather": 1})[-1] == "none"


def test_collectives_of_sharding_propagation_are_in_hlo() -> None:
    mesh = make_runner("devices", (("a", 2), ("b", 4))).mesh  # type: ignore[attr-defined]
    x, w = (
        jax.ShapeDtypeStruct((8, 8), jnp.float32, sharding=NamedSharding(mesh, spec))
        for spec in (P("a", "b"), P("b"))
    )
    assert_collectives(jnp.matmul, (x, w), {})
    assert_collectives(jnp.matmul, (x, w), {("all_reduce", "b"): 1}, source="hlo")
    with pytest.raises(AssertionError, match=r"matmul \(hlo\)\n  all_reduce: 1 time, exp"):
        assert_collectives(jnp.matmul, (x, w), {}, source="hlo")


def test_unknown_name_is_refused() -> None:
    with pytest.raises(
        CmxError, match=r"collective 'psum' is unknown, .* psum, pmax and pmin are 'all_reduce'"
    ):
        assert_collectives(talk, (X,), {"psum": 1})


def refused(fn: Any, expected: Any, **options: Any) -> list[str]:
    with pytest.raises(AssertionError) as error:
        assert_collectives(fn, (X,), expected, **options)
    return [line.strip() for line in str(error.value).splitlines()]
