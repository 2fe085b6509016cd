"""What the collectives of a traced step wait for: microbatches followed through its jaxpr."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

CALLS = ("jaxpr", "call_jaxpr", "call")

Streams = frozenset[Any]
"""The streams that a value depends on, or `WHOLE`: rows of the batch that are not cut into streams yet."""
WHOLE, NONE = frozenset({"whole"}), frozenset()


class Collective(NamedTuple):
    """One that runs, the streams it waits for, and the loops and calls it stands in."""

    name: str
    streams: Streams
    inside: tuple[str, ...]


def collectives(jaxpr: Any, given: Sequence[Streams], parts: int) -> tuple[list[Streams], list[Collective]]:
    """What the results depend on when the arguments depend on `given`, and all collectives."""
    known, found = dict(zip(jaxpr.invars, given, strict=True)), []
    for eqn in jaxpr.eqns:
        ins = [NONE if hasattr(atom, "val") else known.get(atom, NONE) for atom in eqn.invars]
        outs, inner = _results(eqn, ins, parts)
        known.update(zip(eqn.outvars, outs, strict=True))
        found += [c._replace(inside=(eqn.primitive.name, *c.inside)) for c in inner]
        axes = (eqn.params.get(key, ()) for key in ("axis_name", "axes"))
        if ins and any(isinstance(a, str) for axis in axes for a in np.atleast_1d(np.array(axis, object))):
            found.append(Collective(eqn.primitive.name, NONE.union(*ins), ()))
    results = [NONE if hasattr(atom, "val") else known.get(atom, NONE) for atom in jaxpr.outvars]
    return results, found


def _results(eqn: Any, ins: list[Streams], parts: int) -> tuple[list[Streams], list[Collective]]:
    name, p, every = eqn.primitive.name, eqn.params, NONE.union(*ins)
    if name == "slice" and ins[0] == WHOLE:
        size = eqn.invars[0].aval.shape[0] // parts
        first, last = p["start_indices"][0], p["limit_indices"][0]
        assert (first % size, last) == (0, first + size), "rows of the batch that are no stream"
        return [frozenset({first // size})], []
    if name == "cond":
        branches = [collectives(b.jaxpr, ins[1:], parts) for b in p["branches"]]
        outs = [ins[0].union(*of) for of in zip(*(outs for outs, _ in branches), strict=True)]
        return outs, [c._replace(streams=c.streams | ins[0]) for _, found in branches for c in found]
    if name in ("scan", "while"):
        return _loop(eqn, ins, parts)
    inner = next((p[key] for key in CALLS if key in p), None)
    if inner is None:
        return [every] * len(eqn.outvars), []
    return collectives(getattr(inner, "jaxpr", inner), ins, parts)


def _same(outer: Any, inner: Any) -> bool:
    return outer.aval.shape == inner.aval.shape


def _loop(eqn: Any, ins: list[Streams], parts: int) -> tuple[list[Streams], list[Collective]]:
    """Until the carry depends on nothing new; all that a `while` does depends on its condition."""
    p, until, more = eqn.params, NONE, None
    if eqn.primitive.name == "scan":
        body = p["jaxpr"].jaxpr
        # what is scanned has one dimension more outside (parameters that count it differ by JAX version)
        carry = sum(_same(outer, inner) for outer, inner in zip(eqn.outvars, body.outvars, strict=True))
        scanned = sum(not _same(outer, inner) for outer, inner in zip(eqn.invars, body.invars, strict=True))
        before = len(ins) - scanned - carry
        consts = ins[:before]
    else:
        body, more, asked = p["body_jaxpr"].jaxpr, p["cond_jaxpr"].jaxpr, ins[: p["cond_nconsts"]]
        consts = ins[len(asked) : len(asked) + p["body_nconsts"]]
        before = len(asked) + len(consts)
        carry = len(ins) - before
    held, xs = ins[before : before + carry], ins[before + carry :]
    while True:
        if more is not None:
            [until], _ = collectives(more, [*asked, *held], parts)
        outs, found = collectives(body, [*consts, *held, *xs], parts)
        grown = [a | b | until for a, b in zip(held, outs, strict=False)]
        if grown == held:
            return [*held, *(out | until for out in outs[carry:])], [
                c._replace(streams=c.streams | until) for c in found
            ]
        held = grown
