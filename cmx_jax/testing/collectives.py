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
    """Holds the collectives of one run of a function to what is expected. Nothing is run.

    Executions are counted with loops, one for each array that is moved: `lax.psum` of two arrays is two.

    Args:
      fn: jitted or not; under `vmap` axes (the runner `Lanes`) nothing moves, and nothing is found.
      args: its arguments, as arrays or `jax.ShapeDtypeStruct`s.
      expected: executions of each operation (`"all_to_all"`), or of an operation over an axis or axes
        (`("all_to_all", "ep")`, `("all_reduce", ("dp", "ep"))`); None where data decide how often. An
        operation that is named with axes and without them is counted without those that the former counts.
        Names are of `cmx_jax.mesh.trace.ops.collective.OPS`; `psum`, `pmax` and `pmin` are `all_reduce`,
        `ppermute` is `permute`.
      allow: other collectives that may be there any number of times; those of neither fail.
      source: `jaxpr`, what is written; or `hlo`, what the compiler made of it for the devices of `args`. That
        has what sharding propagation inserts; several arrays that travel together are one.

    Raises:
      AssertionError: they differ; it has the differences and a table of what was found.
      CmxError: an operation is unknown.
    """
    __tracebackhide__ = True
    wanted = {_key(key): count for key, count in expected.items()}
    allowed = {_key(key) for key in allow}
    found = trace(fn, *args, source=source)
    executions = _executions(found, {*wanted, *allowed})
    lines = [
        f"  {_name(key)}: {_times(executions.get(key, 0))}, expected {_times(wanted.get(key, 0))}"
        for key in {**wanted, **executions}
        if key not in allowed - wanted.keys() and executions.get(key, 0) != wanted.get(key, 0)
    ]
    if lines:
        table = render(found) if found.collectives else "none"
        name = getattr(fn, "__name__", repr(fn))
        raise AssertionError("\n".join([f"collectives of {name} ({source})", *lines, "found:", table]))


def _key(key: Key) -> tuple[str, tuple[str, ...] | None]:
    op, axes = (key, None) if isinstance(key, str) else key
    if op not in OPS:
        raise CmxError(
            f"collective {op!r} is unknown, expected one of {list(OPS)}: psum, pmax and pmin are "
            "'all_reduce', ppermute is 'permute'"
        )
    return op, (axes,) if isinstance(axes, str) else axes


def _executions(found: Trace, keys: set[Any]) -> dict[Any, int | None]:
    """Of each key: the sum, or None if data decide about any of them."""
    total: dict[Any, int | None] = {}
    for r in found.collectives:
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
