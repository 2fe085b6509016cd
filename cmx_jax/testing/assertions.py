"""An assertion on the collectives of a function."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from cmx_jax.errors import CmxError
from cmx_jax.mesh.trace import Trace, render, trace
from cmx_jax.mesh.trace.ops.collective import OPS

Key = str | tuple[str, str | tuple[str, ...]]
"""An operation, or an operation and the mesh axis or axes that it runs over."""


def assert_collectives(
    fn: Any,
    args: Sequence[Any],
    expected: Mapping[Key, int | None],
    *,
    allow: Iterable[Key] = (),
    source: str = "jaxpr",
) -> None:
    """Asserts that one run of a function has the expected collectives. The function is not run.

    Executions are counted with loops, and once for each array that is moved: `lax.psum` of two arrays is two.

    Args:
      fn: Function, jitted or not. Over `vmap` axes (the runner `Lanes`) nothing moves, so it has none.
      args: Arguments of the function, as arrays or `jax.ShapeDtypeStruct`s.
      expected: Executions of each operation (`"all_to_all"`), or of an operation over an axis or axes
        (`("all_to_all", "ep")`, `("all_reduce", ("dp", "ep"))`); None where data decide how often. If an
        operation is named both with axes and without, the latter counts only the executions over other axes.
        Names are those of `cmx_jax.mesh.trace.ops.collective.OPS`; `psum`, `pmax` and `pmin` are
        `all_reduce`, `ppermute` is `permute`.
      allow: Other collectives that may occur any number of times; any that are in neither fail.
      source: `jaxpr` for the program as written; or `hlo` for the compiler's output for the devices of
        `args`, which has what sharding propagation inserts and counts arrays that travel together as one.

    Raises:
      AssertionError: The collectives differ; the message has the differences and a table of all collectives.
      CmxError: An operation is unknown.

    Example:
      >>> import jax
      >>> from jax.sharding import AbstractMesh, AxisType, PartitionSpec as P
      >>> mesh = AbstractMesh((8,), ("x",), axis_types=(AxisType.Auto,))
      >>> total = jax.shard_map(lambda x: jax.lax.psum(x, "x"), mesh=mesh, in_specs=P("x"), out_specs=P())
      >>> assert_collectives(total, [jax.ShapeDtypeStruct((64,), "float32")], {("all_reduce", "x"): 1})
    """
    __tracebackhide__ = True
    counts = {_key(key): count for key, count in expected.items()}
    allowed = {_key(key) for key in allow}
    result = trace(fn, *args, source=source)
    executions = _executions(result, {*counts, *allowed})
    lines = [
        f"  {_name(key)}: {_times(executions.get(key, 0))}, expected {_times(counts.get(key, 0))}"
        for key in {**counts, **executions}
        if key not in allowed - counts.keys() and executions.get(key, 0) != counts.get(key, 0)
    ]
    if lines:
        table = render(result) if result.collectives else "none"
        name = getattr(fn, "__name__", repr(fn))
        raise AssertionError("\n".join([f"collectives of {name} ({source})", *lines, "found:", table]))


def _key(key: Key) -> tuple[str, tuple[str, ...] | None]:
    """Returns a key as operation and axes, None for any axes."""
    op, axes = (key, None) if isinstance(key, str) else key
    if op not in OPS:
        raise CmxError(
            f"collective {op!r} is unknown, expected one of {list(OPS)}: psum, pmax and pmin are "
            "'all_reduce', ppermute is 'permute'"
        )
    return op, (axes,) if isinstance(axes, str) else axes


def _executions(result: Trace, keys: set[Any]) -> dict[Any, int | None]:
    """Sums the executions of each key; None if data decide about any of them."""
    total: dict[Any, int | None] = {}
    for r in result.collectives:
        exact = r["op"], tuple(r["axes"])
        key = exact if exact in keys else (r["op"], None)
        before = total.get(key, 0)
        total[key] = None if before is None or r["count"] is None else before + r["count"]
    return total


def _name(key: tuple[str, tuple[str, ...] | None]) -> str:
    op, axes = key
    return op if axes is None else f"{op} over {', '.join(axes)}"


def _times(count: int | None) -> str:
    return "as often as data decide" if count is None else f"{count} time{'s' * (count != 1)}"
