"""Compares a sharded computation with the dense one: values, gradients, all copies of replicated results."""

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding

from cmx_jax.errors import CmxError
from cmx_jax.mesh.jax_versions import auto_mesh
from cmx_jax.mesh.specs import map_specs

_RTOL = {"float64": 1e-12, "complex128": 1e-12, "float32": 1e-5, "complex64": 1e-5}
_NARROW_RTOL = 2e-2  # of all narrower types
_SEED = 0  # of the cotangents


def assert_same(
    fn: Callable[..., Any],
    mesh: Mesh | Mapping[str, int],
    specs: Any,
    args: Sequence[Any],
    *,
    sharded: Callable[..., Any] | None = None,
    grad: bool = True,
    rtol: float | None = None,
    atol: float = 0.0,
) -> None:
    """Asserts that a function gives the same on one device and split over a mesh.

    Every copy of a replicated result is compared, so that ranks that disagree are found. Gradients are those
    of the results, weighted by random numbers, for each argument in floating point. A mesh whose axes have
    different sizes shows more mistakes: axes that are swapped, or sums over too many ranks.

    Args:
      fn: Dense function of whole arrays.
      mesh: Mesh to split over, or names and sizes of axes over the first devices.
      specs: Tuple with one spec, or pytree (prefix) of specs, for each argument.
      args: Whole arguments of the function.
      sharded: The same computation written for the mesh, such as a `jax.shard_map`; None: `fn` itself, which
        the compiler splits.
      grad: True to compare gradients as well.
      rtol: Largest difference relative to the largest expected number of an array; None: 1e-12 in float64,
        1e-5 in float32, 2e-2 in narrower types. Integers must be equal.
      atol: Largest difference besides, for arrays that are zeros but for rounding.

    Raises:
      AssertionError: A result or gradient differs; the message names it, the device and its place in the
        mesh, and the element.
      CmxError: There are too few devices.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from jax.sharding import PartitionSpec as P
      >>> x, w = jnp.ones((4, 6)), jnp.ones((6, 2))
      >>> assert_same(jnp.matmul, {"rows": 2, "inner": 3}, (P("rows", "inner"), P("inner")), (x, w))
    """
    if not isinstance(mesh, Mesh):
        count, there = math.prod(mesh.values()), jax.devices()
        if count > len(there):
            raise CmxError(f"a mesh of {dict(mesh)} needs {count} devices, there are {len(there)}")
        mesh = cast(Mesh, auto_mesh(tuple(mesh.items()), there[:count]))
    on, run = mesh, sharded or fn
    alone = jax.device_put(tuple(args), mesh.devices.flat[0])
    split = map_specs(lambda spec, leaf: jax.device_put(leaf, NamedSharding(on, spec)), specs, tuple(args))
    expected, actual = jax.jit(fn)(*alone), jax.jit(run)(*split)
    _compare("result", actual, expected, mesh, rtol, atol)
    if grad:
        rng = np.random.default_rng(_SEED)
        weights = jax.tree.map(lambda leaf: _cotangent(rng, leaf), expected)
        placed = jax.tree.map(lambda w, leaf: jax.device_put(w, leaf.sharding), weights, actual)
        wanted, found = _gradients(fn, alone, weights), _gradients(run, split, placed)
        _compare("gradient of argument", found, wanted, mesh, rtol, atol)


def _is_float(leaf: Any) -> bool:
    return jnp.issubdtype(jnp.result_type(leaf), jnp.inexact)


def _cotangent(rng: np.random.Generator, leaf: Any) -> np.ndarray:
    if not _is_float(leaf):
        return np.zeros(leaf.shape, jax.dtypes.float0)
    return np.asarray(rng.standard_normal(leaf.shape), leaf.dtype)


def _gradients(fn: Callable[..., Any], args: tuple[Any, ...], weights: Any) -> Any:
    """Gradients of the weighted sum of all results; None for arguments that are not in floating point."""
    floats = jax.tree.map(lambda leaf: leaf if _is_float(leaf) else None, args)

    def of_floats(floats: Any) -> Any:
        merged = jax.tree.map(
            lambda leaf, own: own if leaf is None else leaf, floats, args, is_leaf=lambda x: x is None
        )
        return fn(*merged)

    def pull(floats: Any, weights: Any) -> Any:
        _, back = jax.vjp(of_floats, floats)
        return back(weights)[0]

    if any(leaf.dtype == jax.dtypes.float0 for leaf in jax.tree.leaves(weights)):
        return pull(floats, weights)  # float0 is no type of an argument of jit
    return jax.jit(pull)(floats, weights)


def _compare(what: str, actual: Any, expected: Any, mesh: Mesh, rtol: float | None, atol: float) -> None:
    """Compares two trees of arrays.

    Raises:
      AssertionError: The two trees differ.
    """
    sharded, dense = str(jax.tree.structure(actual)), str(jax.tree.structure(expected))
    assert sharded == dense, f"{what}: sharded {sharded}, dense {dense}"
    faults = []
    for (path, leaf), want in zip(
        jax.tree_util.tree_leaves_with_path(actual), jax.tree.leaves(expected), strict=True
    ):
        name = f"{what}{jax.tree_util.keystr(path)}"
        assert (leaf.shape, leaf.dtype) == (want.shape, want.dtype), (
            f"{name}: sharded {leaf.dtype}{list(leaf.shape)}, dense {want.dtype}{list(want.shape)}"
        )
        fault = _difference(leaf, np.asarray(want), mesh, rtol, atol)
        faults += [f"{name}: {fault}"] if fault else []
    assert not faults, "\n".join(faults)


def _difference(leaf: jax.Array, want: np.ndarray, mesh: Mesh, rtol: float | None, atol: float) -> str | None:
    """Describes how the parts of an array on the devices differ from the dense array, or returns None."""
    wide = want.astype(np.complex128 if np.iscomplexobj(want) else np.float64)
    limit = 0.0
    if _is_float(want):
        largest = np.abs(wide, where=np.isfinite(wide), out=np.zeros(wide.shape)).max(initial=0.0)
        usual = _RTOL.get(want.dtype.name, _NARROW_RTOL)
        limit = atol + largest * (usual if rtol is None else rtol)
    worst: tuple[float, str] | None = None
    beyond = np.zeros(want.shape, bool)
    for shard in leaf.addressable_shards:
        part, dense = np.asarray(shard.data).astype(wide.dtype), wide[shard.index]
        same = (part == dense) | (np.isnan(part) & np.isnan(dense))
        off = np.where(same, 0.0, np.abs(part - dense))
        off = np.where(np.isnan(off), np.inf, off)
        beyond[shard.index] |= off > limit
        if off.size and off.max() > limit and (worst is None or off.max() > worst[0]):
            at = np.unravel_index(int(off.argmax()), off.shape)
            whole = [int(i) + (s.start or 0) for i, s in zip(at, shard.index, strict=True)]
            text = f"{_device(shard.device, mesh)} has {part[at]:g} at {whole}, dense {dense[at]:g}"
            worst = float(off.max()), text
    if worst is None:
        return None
    counted = f"{int(beyond.sum())} of {beyond.size} elements differ by more than {limit:.3g}"
    return f"{worst[1]}; {counted}{_hint(leaf, wide, mesh)}"


def _device(device: Any, mesh: Mesh) -> str:
    """Name of a device, with its place in the mesh."""
    [place] = np.argwhere(mesh.devices == device)
    names = ", ".join(f"{name}={i}" for name, i in zip(mesh.axis_names, place, strict=True))
    return f"device {device.id} ({names})"


def _hint(leaf: jax.Array, wide: np.ndarray, mesh: Mesh) -> str:
    """Names the axes whose size is the factor between all elements of the sharded and the dense array."""
    found = np.asarray(leaf).astype(wide.dtype)
    used = np.abs(wide) > 1e-6 * np.abs(wide).max(initial=0.0)
    if not used.any():
        return ""
    ratios = (found[used] / wide[used]).real
    ratio = float(np.median(ratios))
    if not np.allclose(ratios, ratio, rtol=1e-2) or abs(ratio) < 1e-9:
        return ""
    sizes = {name: size for name, size in mesh.shape.items() if size > 1}
    for count in range(1, len(sizes) + 1):
        for names in itertools.combinations(sizes, count):
            size = math.prod(sizes[name] for name in names)
            axes = " and ".join(map(repr, names))
            if math.isclose(ratio, size, rel_tol=1e-2):
                return f"; all are {size} times the dense ones, the size of {axes}: summed once too often?"
            if math.isclose(ratio * size, 1, rel_tol=1e-2):
                return f"; all are 1/{size} of the dense ones, the size of {axes}: a sum is missing?"
    return ""
