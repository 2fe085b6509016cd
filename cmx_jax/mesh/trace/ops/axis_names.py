"""One name for the mesh axes of a collective, whatever source it was read from.

Compiled programs have groups of ranks, not axes. Several names may fit the same groups: axes in either order,
axes of one rank, another mesh over the same devices, or an axis of which a collective takes parts
(`axis_index_groups`). The program as written says which name was meant.
"""

from collections.abc import Iterable
from dataclasses import replace
from functools import cache

from cmx_jax.mesh.groups import Groups
from cmx_jax.mesh.trace.ops.collective import Collective


def named_as_in(collectives: Iterable[Collective], written: Iterable[Collective]) -> list[Collective]:
    """Returns collectives with the axes of the first written collective that has the same groups."""
    names: dict[object, tuple[str, ...]] = {}
    for c in written:
        if (key := _key(c)) is not None:
            names.setdefault(key, c.axes)
    return [replace(c, axes=names.get(_key(c), c.axes)) for c in collectives]


def _key(c: Collective) -> object:
    """Returns the ranks that exchange data; None if the source does not list them."""
    if c.pairs is not None:
        return "pairs", frozenset(pair for pair in c.pairs if pair[0] != pair[1])
    return None if c.groups is None else _sets(c.groups)


@cache
def _sets(groups: Groups) -> frozenset[frozenset[int]]:
    return frozenset(map(frozenset, groups))
