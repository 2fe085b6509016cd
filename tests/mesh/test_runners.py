"""A per-rank function has the same values under every runner, compared with shards cut by NumPy."""

from collections.abc import Callable
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import struct
from jax.sharding import PartitionSpec as P

from cmx_jax.errors import CmxError
from cmx_jax.mesh import Abstract, Lanes, Runner, make_runner
from cmx_jax.mesh.exchange import gather

AXES = (("a", 2), ("b", 3))
SIZES = dict(AXES)
RANKS = [{"a": a, "b": b} for a in range(2) for b in range(3)]
SPECS = [P("a"), P(None, "a"), P(("a", "b")), P(("b", "a")), P("b", None, "a"), P("a", "b"), P()]
WHOLE = np.arange(6 * 6 * 4, dtype=np.int32).reshape(6, 6, 4)

each_kind = pytest.mark.parametrize("kind", ["devices", "lanes", "two devices with three lanes"])


def runner_of(kind: str) -> Runner:
    """Returns a runner over `AXES`."""
    return make_runner(kind, AXES) if " " not in kind else make_runner("devices", AXES, 0, 3)


def skip_crossed(kind: str, spec: P) -> None:
    """Skips a spec that splits a dimension over lanes before devices, which is refused."""
    if " " in kind and spec == P(("b", "a")):
        pytest.skip("lanes come after devices")


def shard(array: np.ndarray, spec: P, rank: dict[str, int]) -> np.ndarray:
    """Returns the part of an array that a rank holds."""
    for dim, entry in enumerate(spec):
        names = (entry,) if isinstance(entry, str) else entry or ()
        index, parts = 0, 1
        for name in names:
            index, parts = index * SIZES[name] + rank[name], parts * SIZES[name]
        array = np.split(array, parts, axis=dim)[index]
    return array


def talk(x: jax.Array) -> jax.Array:
    """Uses each kind of collective: a rank's result shows its number and the ranks it received from."""
    b = jax.lax.axis_index("b")
    me = jax.lax.axis_index("a") * 3 + b
    total = jax.lax.psum(jnp.sum(x), ("a", "b"))
    received = jax.lax.all_to_all(me * 10 + jnp.arange(3), "b", 0, 0)
    return ((me + 1) * x + total + jnp.sum(received * jnp.array([1, 100, 10_000])))[None]


@each_kind
@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_ranks_hold_their_shards_and_communicate(kind: str, spec: P) -> None:
    skip_crossed(kind, spec)
    results = runner_of(kind).jit(talk, (spec,), P(("a", "b")))(WHOLE)
    total = sum(shard(WHOLE, spec, rank).sum() for rank in RANKS)
    for me, (rank, result) in enumerate(zip(RANKS, np.asarray(results), strict=True)):
        received = [(rank["a"] * 3 + b) * 10 + rank["b"] for b in range(3)]
        expected = (me + 1) * shard(WHOLE, spec, rank) + total + np.dot(received, [1, 100, 10_000])
        np.testing.assert_array_equal(result, expected)


@each_kind
@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_results_are_assembled_by_their_spec(kind: str, spec: P) -> None:
    skip_crossed(kind, spec)
    runner = runner_of(kind)
    double = runner.jit(lambda x: 2 * x, (spec,), spec)
    np.testing.assert_array_equal(double(WHOLE), 2 * WHOLE)
    np.testing.assert_array_equal(double(runner.put(WHOLE, spec)), 2 * WHOLE)


@each_kind
def test_result_with_another_spec_than_the_argument(kind: str) -> None:
    transpose = runner_of(kind).jit(lambda x: x.T, (P("a", ("b",)),), P("b", "a"))
    np.testing.assert_array_equal(transpose(WHOLE[..., 0]), WHOLE[..., 0].T)


@each_kind
def test_replicated_result_is_returned_once(kind: str) -> None:
    total = runner_of(kind).jit(lambda x: jax.lax.psum(x, ("a", "b")), (P(("a", "b")),), P())
    np.testing.assert_array_equal(total(WHOLE), WHOLE.sum(0, keepdims=True))


@struct.dataclass
class Pair:
    left: Any
    right: Any


@each_kind
@pytest.mark.parametrize(
    "specs",
    [P("b"), Pair(left=P("b"), right=P("b")), Pair(left=P("a", "b"), right=P(None, "a"))],
    ids=["prefix", "full", "mixed"],
)
@pytest.mark.parametrize("missing", ["neither", "left", "right"])
def test_pytrees_with_specs_per_leaf_or_prefix(kind: str, specs: Any, missing: str) -> None:
    tree: Any = Pair(left=WHOLE, right=(WHOLE + 1, {"deep": WHOLE + 2}))
    if missing != "neither":
        tree = tree.replace(**{missing: None})
    runner = runner_of(kind)
    step = runner.jit(lambda t, _: jax.tree.map(lambda x: x + 1, t), (specs, P()), specs)
    result = step(runner.put(tree, specs), None)
    chex.assert_trees_all_equal(result, jax.tree.map(lambda x: x + 1, tree))


@each_kind
def test_donated_argument_is_deleted(kind: str) -> None:
    runner = runner_of(kind)
    step = runner.jit(lambda x, y: (x + y, y), (P("a"), P("a")), (P("a"), P("a")), donate_argnums=(0,))
    x, y = runner.put((WHOLE, WHOLE), (P("a"), P("a")))
    np.testing.assert_array_equal(step(x, y)[0], 2 * WHOLE)
    assert (x.is_deleted(), y.is_deleted()) == (True, False)


def test_devices_hold_only_their_shards() -> None:
    placed = make_runner("devices", AXES, first_device=6).put(WHOLE, P("b", None, "a"))
    for rank, device in zip(RANKS, jax.devices()[6:12], strict=True):
        [part] = [s.data for s in placed.addressable_shards if s.device == device]
        np.testing.assert_array_equal(part, shard(WHOLE, P("b", None, "a"), rank))


@pytest.mark.parametrize("ranks", [384, 768])
def test_abstract_traces_and_lowers_wide_programs(ranks: int) -> None:
    runner = Abstract((("a", ranks // 3), ("b", 3)))
    x = runner.put(jax.ShapeDtypeStruct((ranks * 2, 7), jnp.int32), P(("a", "b")))
    traced = runner.jit(talk, (P(("a", "b")),), P(("a", "b"))).trace(x)
    assert [out.shape for out in traced.jaxpr.out_avals] == [(ranks, 2, 7)]
    assert {"psum", "all_to_all", "axis_index"} <= primitives(traced.jaxpr)
    program = traced.lower(lowering_platforms=("tpu",)).as_text()
    assert "stablehlo.all_reduce" in program
    assert "stablehlo.all_to_all" in program
    assert f'"a"={ranks // 3}' in program


def primitives(jaxpr: Any) -> set[str]:
    inner = (p for eqn in jaxpr.eqns for p in eqn.params.values() if hasattr(p, "eqns"))
    return {eqn.primitive.name for eqn in jaxpr.eqns}.union(*map(primitives, inner))


def refused(call: Callable[[], object]) -> str:
    with pytest.raises(CmxError) as error:
        call()
    assert "\n" not in str(error.value)
    return str(error.value)


def test_program_on_257_cpu_devices_is_refused() -> None:
    message = refused(lambda: make_runner("devices", (("a", 257),)))
    assert "257 CPU devices would deadlock" in message
    assert "256 devices or fewer, several ranks per device, or runner 'lanes'" in message
    assert make_runner("devices", (("a", 16), ("b", 16))).axes == (("a", 16), ("b", 16))


def test_invalid_runners_are_refused() -> None:
    assert "385 are needed" in refused(lambda: make_runner("devices", (("a", 1),), first_device=384))
    assert "runner 'cluster' is unknown, expected one of" in refused(lambda: make_runner("cluster", AXES))
    uneven = Lanes(AXES).jit(lambda x: x, (P("b"),), P("b"))
    assert "an array dimension of 4 does not divide over 3 ranks" in refused(lambda: uneven(np.zeros((4, 2))))


def test_ranks_per_device_that_are_no_innermost_axes_are_refused() -> None:
    message = refused(lambda: make_runner("devices", (("a", 2), ("b", 3)), ranks_per_device=2))
    assert message == (
        "2 ranks per device, expected the size of the innermost axes: of {'a': 2, 'b': 3} that is 1 or 3 or 6"
    )
    crossed = make_runner("devices", AXES, ranks_per_device=3).jit
    assert "has lanes before devices, expected the axes ['b'] last" in refused(
        lambda: crossed(lambda x: x, (P(("b", "a")),), P())
    )


def test_collectives_over_devices_and_lanes() -> None:
    """Each collective over both axes, or one axis after the other, equals that of six lanes."""

    def collectives(x: jax.Array) -> tuple[jax.Array, ...]:
        rows = jnp.tile(x, (6, 1)) * jnp.arange(1, 7, dtype=x.dtype)[:, None]
        summed = rows
        for name in ("a", "b"):
            summed = jax.lax.psum_scatter(summed, name, scatter_dimension=0, tiled=True)
        return (
            jax.lax.psum(x, ("a", "b")),
            jax.lax.pmax(x, ("a", "b")),
            jax.lax.all_to_all(rows, ("a", "b"), 0, 0),
            jax.lax.all_to_all(rows, ("a", "b"), 0, 1, tiled=True),
            gather(x, ("a", "b")),
            summed,
            jax.lax.ppermute(x, "b", [(0, 2), (2, 1), (1, 0)]),
            jax.lax.axis_index(("a", "b"))[None],
        )

    both = P(("a", "b"))
    x = np.arange(24, dtype=np.float32).reshape(6, 4)
    runs = [runner_of(kind).jit(collectives, (both,), both)(x) for kind in ("lanes", "two devices")]
    chex.assert_trees_all_equal(*runs)


@pytest.mark.parametrize("runner", [*map(runner_of, ("devices", "lanes", "two devices")), Abstract(AXES)])
def test_runners_follow_the_protocol(runner: Runner) -> None:
    assert isinstance(runner, Runner)
    assert runner.axes == AXES
