"""Reads collectives and products from a jaxpr: the program as written, before any compiler."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from cmx_jax.mesh.trace.equations import (
    DONE,
    OPS,
    PRODUCTS,
    STAYING,
    collectives_of,
    named_axes,
    place_of,
    product_of,
    remote_copies_of,
)
from cmx_jax.mesh.trace.explicit import explicit_axes, implied_collective, is_split_by_compiler, local_bytes
from cmx_jax.mesh.trace.ops.collective import Collective
from cmx_jax.mesh.trace.ops.contents import Contents, Context, merge_branches, over
from cmx_jax.mesh.trace.ops.scope import join_scopes, scopes
from cmx_jax.mesh.trace.pallas import grid_steps


def read_jaxpr(jaxpr: Any) -> Contents:
    """Reads the collectives and products of a (closed) jaxpr.

    Loops of known length are counted. An operation in a `while`, or in one branch of a condition and not in
    the same way in all of them, has count None: data decide.

    Example:
      >>> import jax
      >>> jaxpr = jax.make_jaxpr(lambda x: x @ x)(jax.ShapeDtypeStruct((4, 4), "float32"))
      >>> [product] = read_jaxpr(jaxpr).products
      >>> product.flops
      128
    """
    contents, program = Contents(), getattr(jaxpr, "jaxpr", jaxpr)
    _walk(program, Context(), contents)
    contents.notes += [f"{count} x {name}" for name, count in contents.unknown.items()]
    arguments = [v.aval for v in program.invars]
    if explicit := [aval for aval in arguments if explicit_axes(aval)]:
        contents.axes |= dict(explicit[0].sharding.mesh.shape)
        contents.arguments = sum(local_bytes(aval) for aval in arguments)
    if contents.implied or (explicit and not _only_maps(program)):
        named = ", ".join(f"{count} x {name}" for name, count in contents.implied.items())
        contents.notes.append(
            "shardings are explicit: the compiler inserts the collectives that they imply"
            f"{f' ({named})' if named else ''}, which source hlo shows"
        )
    return contents


def _walk(jaxpr: Any, context: Context, contents: Contents) -> None:
    started: dict[Any, list[Collective]] = {}  # by the results of asynchronous starts
    for eqn in jaxpr.eqns:
        op_name = f"{eqn.source_info.name_stack}/{eqn.primitive}"
        inside = replace(context, scope=join_scopes(context.scope, scopes(op_name)))
        name = eqn.primitive.name
        if implied := implied_collective(eqn):
            contents.implied[implied] += 1
        if (name in OPS or name in PRODUCTS) and (inside.auto or is_split_by_compiler(eqn)):
            contents.unsplit[over(name, inside.auto)] += 1
        if name in OPS:
            found = list(collectives_of(eqn, OPS[name], inside, contents))
            contents.collectives += found
            started |= dict.fromkeys(eqn.outvars, found) if name.endswith("_start") else {}
        elif name in DONE:
            _await(eqn, started, contents)
        elif name in PRODUCTS:
            contents.products.append(product_of(eqn, inside, contents))
        elif name == "dma_start":
            contents.collectives += remote_copies_of(eqn, inside, contents)
        elif name == "pallas_call":
            _walk(eqn.params["jaxpr"], inside.times(grid_steps(eqn)), contents)
        elif name == "scan":
            _walk(eqn.params["jaxpr"].jaxpr, inside.times(eqn.params["length"]), contents)
        elif name == "while":
            for part in ("cond_jaxpr", "body_jaxpr"):
                _walk(eqn.params[part].jaxpr, inside.times(None), contents)
        elif name == "cond":
            _branches(eqn.params["branches"], inside, contents)
        elif name == "shard_map":
            inside = _in_mesh(eqn, inside, contents)
            arguments = (v.aval for v in eqn.params["jaxpr"].invars)
            contents.arguments = contents.arguments or sum(map(local_bytes, arguments))
            _walk(eqn.params["jaxpr"], inside, contents)
        else:
            if (axes := named_axes(eqn, inside)) and name not in STAYING:
                contents.unknown[
                    f"{name} over {', '.join(axes)} ({place_of(eqn)}): unknown, what it moves is not counted"
                ] += 1
            for inner in _inner(eqn.params.values()):
                _walk(inner, inside, contents)


def _in_mesh(eqn: Any, context: Context, contents: Contents) -> Context:
    """Returns the context inside a `shard_map`, and adds its mesh to the contents."""
    axes = tuple(eqn.params["mesh"].shape.items())
    contents.axes |= dict(axes)
    if axes not in contents.meshes:
        contents.meshes.append(axes)
    return replace(context, axes=axes, manual=(*context.manual, *eqn.params["newly_manual_axes"]))


def _await(eqn: Any, started: dict[Any, list[Collective]], contents: Contents) -> None:
    """Notes where the program waits for the collectives that an equation completes."""
    position = next(contents.order)
    for one in {id(c): c for v in eqn.invars if v in started for c in started[v]}.values():
        at = next(i for i, c in enumerate(contents.collectives) if c is one)
        contents.collectives[at] = replace(one, awaited_at=position)


def _only_maps(jaxpr: Any) -> bool:
    """Returns whether explicitly sharded arrays only go into `shard_map`s over all axes."""

    def is_map(eqn: Any) -> bool:
        inside = eqn.params["jaxpr"].invars if eqn.primitive.name == "shard_map" else eqn.invars
        return not any(explicit_axes(v.aval) for v in inside)

    return all(
        all(map(_only_maps, _inner(eqn.params.values())))
        if eqn.primitive.name in ("jit", "pjit")
        else is_map(eqn)
        for eqn in jaxpr.eqns
    )


def _inner(values: Any) -> Iterator[Any]:
    """Yields the jaxprs among an equation's parameters."""
    for value in values:
        if isinstance(value, tuple | list):
            yield from _inner(value)
        elif hasattr(value, "eqns") or hasattr(value, "jaxpr"):
            yield getattr(value, "jaxpr", value)


def _branches(branches: Any, context: Context, contents: Contents) -> None:
    parts = []
    for branch in branches:
        parts.append(Contents(order=contents.order))
        _walk(branch.jaxpr, context, parts[-1])
    merge_branches(parts, contents)
