"""Data dependencies of the collectives of a traced step: microbatches followed through its jaxpr."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

CALLS = ("jaxpr", "call_jaxpr", "call")

Streams = frozenset[Any]
"""Streams on which a value depends, or `WHOLE` for rows of the batch that are not yet cut into streams."""
WHOLE, NONE = frozenset({"whole"}), frozenset()


class Collective(NamedTuple):
    """A collective, the streams it waits for, and the loops and calls around it."""

    name: str
    streams: Streams
    inside: tuple[str, ...]


def collectives(
    jaxpr: Any, arguments: Sequence[Streams], parts: int
) -> tuple[list[Streams], list[Collective]]:
    """Streams on which the results depend, given those of the arguments, and all collectives."""
    known, calls = dict(zip(jaxpr.invars, arguments, strict=True)), []
    for eqn in jaxpr.eqns:
        ins = [NONE if hasattr(atom, "val") else known.get(atom, NONE) for atom in eqn.invars]
        outs, inner = _results(eqn, ins, parts)
        known.update(zip(eqn.outvars, outs, strict=True))
        calls += [c._replace(inside=(eqn.primitive.name, *c.inside)) for c in inner]
        axes = (eqn.params.get(key, ()) for key in ("axis_name", "axes"))
        if ins and any(isinstance(a, str) for axis in axes for a in np.atleast_1d(np.array(axis, object))):
            calls.append(Collective(eqn.primitive.name, NONE.union(*ins), ()))
    results = [NONE if hasattr(atom, "val") else known.get(atom, NONE) for atom in jaxpr.outvars]
    return results, calls


def _results(eqn: Any, ins: list[Streams], parts: int) -> tuple[list[Streams], list[Collective]]:
    name, p, every = eqn.primitive.name, eqn.params, NONE.union(*ins)
    if name == "slice" and ins[0] == WHOLE:
        size = eqn.invars[0].aval.shape[0] // parts
        first, last = p["start_indices"][0], p["limit_indices"][0]
        assert (first % size, last) == (0, first + size), "rows of the batch that are not a stream"
        return [frozenset({first // size})], []
    if name == "cond":
        branches = [collectives(b.jaxpr, ins[1:], parts) for b in p["branches"]]
        outs = [ins[0].union(*values) for values in zip(*(outs for outs, _ in branches), strict=True)]
        return outs, [c._replace(streams=c.streams | ins[0]) for _, calls in branches for c in calls]
    if name in ("scan", "while"):
        return _loop(eqn, ins, parts)
    inner = next((p[key] for key in CALLS if key in p), None)
    if inner is None:
        return [every] * len(eqn.outvars), []
    return collectives(getattr(inner, "jaxpr", inner), ins, parts)


def _same(outer: Any, inner: Any) -> bool:
    return outer.aval.shape == inner.aval.shape


def _loop(eqn: Any, ins: list[Streams], parts: int) -> tuple[list[Streams], list[Collective]]:
    """Runs the body until the carry depends on nothing new. All that a `while` does depends on its
    condition."""
    p, until, condition = eqn.params, NONE, None
    if eqn.primitive.name == "scan":
        body = p["jaxpr"].jaxpr
        # what is scanned has one dimension more outside (parameters that count it differ by JAX version)
        carry = sum(_same(outer, inner) for outer, inner in zip(eqn.outvars, body.outvars, strict=True))
        scanned = sum(not _same(outer, inner) for outer, inner in zip(eqn.invars, body.invars, strict=True))
        before = len(ins) - scanned - carry
        consts = ins[:before]
    else:
        body, condition = p["body_jaxpr"].jaxpr, p["cond_jaxpr"].jaxpr
        cond_consts = ins[: p["cond_nconsts"]]
        consts = ins[len(cond_consts) : len(cond_consts) + p["body_nconsts"]]
        before = len(cond_consts) + len(consts)
        carry = len(ins) - before
    carried, xs = ins[before : before + carry], ins[before + carry :]
    while True:
        if condition is not None:
            [until], _ = collectives(condition, [*cond_consts, *carried], parts)
        outs, calls = collectives(body, [*consts, *carried, *xs], parts)
        grown = [a | b | until for a, b in zip(carried, outs, strict=False)]
        if grown == carried:
            return [*carried, *(out | until for out in outs[carry:])], [
                c._replace(streams=c.streams | until) for c in calls
            ]
        carried = grown
