"""Traces a function named on the command line, with its mesh and the shapes of its arguments."""

import importlib
import math
import re
import sys
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from cmx_jax.errors import CmxError
from cmx_jax.mesh.host import request_devices
from cmx_jax.mesh.jax_versions import placement_advice, typed_mesh
from cmx_jax.mesh.targets import target_devices
from cmx_jax.mesh.trace.program import check_source, trace
from cmx_jax.mesh.trace.table import Trace, View

ARRAY = re.compile(r"(\w+)\[([\d,\s]*)\](?:@(.+))?")
MAX_REQUESTED = 1024  # devices; wider meshes are abstract ones
FORM = "such as float32[1024,4096]@-,x (a dimension over no axis, one over x; a+b: over both)"


HINTS = {  # part of a message of JAX, and what to do
    "Number of devices": "; --devices N asks for N virtual devices",
    "should match the mesh passed to shard_map": "; give the function's own mesh: --mesh package.module:mesh",
}


def trace_function(
    name: str,
    args: Sequence[str],
    mesh: str | None = None,
    *,
    source: str = "jaxpr",
    target: str = "cpu",
    dump: Path | None = None,
    view: View = View(),  # noqa: B008 (frozen)
) -> Trace:
    """Traces `package.module:function`; the module may be in the current folder.

    Args:
      name: Name of the function, which may be jitted.
      args: One text for each argument: `dtype[shape]`, and after `@` how it is split over the mesh. Or a
        single `package.module:function` whose function returns all arguments (a tuple of pytrees).
      mesh: Mesh as `axis=size,...`, with `Auto` axes, or `axis=size:explicit` for `Explicit` ones; or
        `package.module:mesh`, a mesh of the user's own. `jax.shard_map` without a mesh runs on it. None if
        neither the arguments nor the function's context need one.
      source, target, dump, view: Options of `cmx_jax.mesh.trace.trace`.

    Raises:
      CmxError: The function does not exist or fails, or an argument or the mesh is not understood.
    """
    check_source(source)  # before the module is imported
    if mesh is not None and "=" in mesh:
        _request_devices(math.prod(read_mesh(mesh)[0].values()))
    fn = load(name)
    actual_mesh = _mesh_of(mesh, target if source == "hlo" else None)
    arguments = read_args(args, actual_mesh)
    with nullcontext() if mesh is None else _current_mesh(actual_mesh):
        try:
            traced = (fn if hasattr(fn, "trace") else jax.jit(fn)).trace(*arguments)
        except Exception as error:  # the function may raise anything
            raise _failed(name, error) from None
        return trace(traced, *arguments, source=source, target=target, dump=dump, view=view)


def _mesh_of(text: str | None, target: str | None) -> Mesh | AbstractMesh:
    """Returns the mesh that `--mesh` names; one without axes for None.

    Args:
      text: Mesh in the form that `trace_function` takes.
      target: Target whose devices the mesh is made of; None for an abstract mesh.
    """
    if text is not None and ":" in text and "=" not in text:
        mesh = _attribute(text)
        if not isinstance(mesh, Mesh | AbstractMesh):
            raise CmxError(
                f"mesh {text} is a {type(mesh).__name__}, expected a jax.sharding.Mesh or AbstractMesh"
            )
        return mesh
    sizes, explicit = read_mesh(text)
    devices = target_devices(target, math.prod(sizes.values())) if target and sizes else None
    return typed_mesh(tuple(sizes.items()), explicit, devices)


def _current_mesh(mesh: Mesh | AbstractMesh) -> AbstractContextManager[Any]:
    """Makes a mesh the one that `jax.shard_map` without a mesh runs on."""
    return jax.set_mesh(mesh) if isinstance(mesh, Mesh) else jax.sharding.use_abstract_mesh(mesh)


def read_mesh(text: str | None) -> tuple[dict[str, int], frozenset[str]]:
    """Reads `node=4,npu=8:explicit`: the size of each axis, and the names of the `Explicit` axes."""
    sizes: dict[str, int] = {}
    explicit = set()
    for part in filter(None, (text or "").split(",")):
        axis, _, size = part.partition("=")
        size, _, kind = size.partition(":")
        good = axis.isidentifier() and size.isdecimal() and int(size) > 0 and kind in ("", "auto", "explicit")
        if not good or axis in sizes:
            raise CmxError(
                f"mesh {text!r}, expected different axes and sizes such as node=4,npu=8 (npu=8:explicit for "
                "explicit shardings), or package.module:mesh"
            )
        sizes[axis] = int(size)
        if kind == "explicit":
            explicit.add(axis)
    return sizes, frozenset(explicit)


def _request_devices(count: int) -> None:
    """Asks for virtual devices, as a module may make a mesh of them while it is imported."""
    if count <= MAX_REQUESTED:
        with suppress(CmxError):  # JAX has started: there are as many as there are
            request_devices(count)


def _attribute(name: str) -> Any:
    """Returns the object `package.module:name` (or `:object.attribute`)."""
    module, _, path = name.partition(":")
    if str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))
    try:
        result: Any = importlib.import_module(module)
        for part in path.split("."):
            result = getattr(result, part)
    except Exception as error:  # the import may raise anything
        raise _failed(name, error) from None
    return result


def load(name: str) -> Callable[..., Any]:
    """Returns the function `package.module:function` (or `:object.method`)."""
    module, _, path = name.partition(":")
    if not module or not path:
        raise CmxError(f"function {name!r}, expected package.module:function")
    function = _attribute(name)
    if not callable(function):
        raise CmxError(f"{name} is a {type(function).__name__}, expected a function")
    return function


def read_args(args: Sequence[str], mesh: Mesh | AbstractMesh) -> tuple[Any, ...]:
    """Reads arguments from their texts, or calls the function that returns them."""
    if len(args) == 1 and ":" in args[0]:
        arguments = load(args[0])()
        return arguments if isinstance(arguments, tuple) else (arguments,)
    return tuple(_array(text, mesh) for text in args)


def _array(text: str, mesh: Mesh | AbstractMesh) -> jax.ShapeDtypeStruct:
    match = ARRAY.fullmatch(text.strip())
    if not match:
        raise CmxError(f"argument {text!r}, expected dtype[shape] and how it is split, {FORM}")
    shape = tuple(int(size) for size in match[2].split(",") if size.strip())
    split = [part.split("+") if part != "-" else [] for part in (match[3] or "").split(",") if part]
    used = [axis for axes in split for axis in axes]
    if len(split) > len(shape) or len(set(used)) < len(used):
        raise CmxError(
            f"argument {text!r}: expected at most {len(shape)} dimensions to be split, an axis for one"
        )
    for size, axes in zip(shape, split, strict=False):
        if unknown := [axis for axis in axes if axis not in mesh.shape]:
            raise CmxError(f"argument {text!r}: no axis {unknown[0]!r}, expected one of {list(mesh.shape)}")
        if size % (parts := math.prod(mesh.shape[axis] for axis in axes)):
            raise CmxError(f"argument {text!r}: {size} does not divide over {parts} ranks of {axes}")
    try:
        sharding = NamedSharding(mesh, P(*(tuple(axes) or None for axes in split))) if split else None
        return jax.ShapeDtypeStruct(shape, jnp.dtype(match[1]), sharding=sharding)
    except (TypeError, ValueError) as error:
        raise CmxError(f"argument {text!r}: {_first_line(error)}") from None


def _failed(name: str, error: Exception) -> CmxError:
    """Returns the error to raise for an error of a function or module, with the line that raised it."""
    if isinstance(error, CmxError):
        return error
    last = error.__traceback__
    while last is not None and last.tb_next is not None:
        last = last.tb_next
    line = f" ({Path(last.tb_frame.f_code.co_filename).name}:{last.tb_lineno})" if last is not None else ""
    if advice := placement_advice(error):
        reason = _first_line(error).split(". ")[0]
        return CmxError(f"{name}: {reason}; with --args, dtype[shape]@axes on --mesh places it; {advice}")
    hint = next((hint for text, hint in HINTS.items() if text in str(error)), "")
    return CmxError(f"{name}: {type(error).__name__}: {_first_line(error)}{line}{hint}")


def _first_line(error: Exception) -> str:
    no_message = "JAX gave no message; is the axis of each collective one of the mesh's axes?"
    return next(filter(None, str(error).splitlines()), no_message)
