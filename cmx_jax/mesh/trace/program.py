"""Traces a program from one of three sources: its jaxpr, its StableHLO or its optimised HLO.

The jaxpr is the program as written, StableHLO is the compiler's input, and HLO is its output for one target.
In this order they are trusted to show what was meant; notes tell where they differ.
"""

import math
import time
from pathlib import Path
from typing import Any, NamedTuple

import jax
from jax.sharding import NamedSharding

from cmx_jax.errors import CmxError
from cmx_jax.mesh.jax_versions import placement_advice
from cmx_jax.mesh.targets import compiler_options
from cmx_jax.mesh.trace.differences import Row, differences
from cmx_jax.mesh.trace.hlo.reader import read_hlo
from cmx_jax.mesh.trace.jaxpr import read_jaxpr
from cmx_jax.mesh.trace.ops.axis_names import named_as_in
from cmx_jax.mesh.trace.ops.contents import Contents
from cmx_jax.mesh.trace.ops.sizes import array_bytes
from cmx_jax.mesh.trace.perfetto import write_timeline
from cmx_jax.mesh.trace.stablehlo import read_stablehlo
from cmx_jax.mesh.trace.table import Trace, View, scaled, table

SOURCES = ("jaxpr", "stablehlo", "hlo")


def trace(
    fn: Any,
    *args: Any,
    source: str = "jaxpr",
    target: str = "cpu",
    dump: Path | None = None,
    view: View = View(),  # noqa: B008 (frozen)
) -> Trace:
    """Traces a function; nothing is computed.

    Args:
      fn: Function, jitted or not, with a `shard_map` inside or with shardings for the compiler to decide
        (GSPMD); or the result of `jax.jit(fn).trace(...)`.
      args: Arguments of the function: arrays or `jax.ShapeDtypeStruct`s.
      source: One of `SOURCES`. For `hlo` the mesh must have devices, of CPU or of a topology
        (`cmx_jax.mesh.targets.target_devices`). Only `hlo` has the collectives that the compiler inserts.
      target: Target of the compiler, as `target_devices` takes it.
      dump: Folder for the program's texts, and for its schedule as a trace for ui.perfetto.dev.
      view: Placement of the ranks, and which part of what they move and compute is useful.

    Returns:
      The collectives, operations and memory of one rank.

    Raises:
      CmxError: The source is unknown, the program cannot be compiled, or `shard_map` refuses an argument that
        is not split over a mesh of `Explicit` axes as it should be. Other errors pass through.

    Example:
      >>> import jax
      >>> from jax.sharding import AbstractMesh, AxisType, PartitionSpec as P
      >>> mesh = AbstractMesh((8,), ("x",), axis_types=(AxisType.Auto,))
      >>> total = jax.shard_map(lambda x: jax.lax.psum(x, "x"), mesh=mesh, in_specs=P("x"), out_specs=P())
      >>> [row] = trace(total, jax.ShapeDtypeStruct((64,), "float32")).collectives
      >>> row["op"], row["axes"], row["wire_bytes"]
      ('all_reduce', ['x'], 56.0)
    """
    check_source(source)
    seconds: dict[str, float] = {}
    with _timed(seconds, "trace"):
        traced = fn if hasattr(fn, "jaxpr") else _traced(fn, args)
        written = contents = read_jaxpr(traced.jaxpr)
    texts = {"jaxpr.txt": traced.jaxpr}
    arguments = _placed_bytes(args) or written.arguments
    memory = {"arguments": arguments} if arguments else {}
    if source != "jaxpr":
        lowered = _lowered(traced, written, source, target, seconds)
        contents, texts, memory = lowered.contents, texts | lowered.texts, memory | lowered.memory
        contents.collectives = named_as_in(contents.collectives, written.collectives)
    if source == "stablehlo":
        contents.notes.extend(written.notes)
    if source != "hlo" and (note := _undecided(contents, args)):
        contents.notes.append(note)
    result = table(source, contents, view, memory, seconds)
    if source != "jaxpr":
        written.collectives = named_as_in(written.collectives, written.collectives)
        result.notes.extend(_compared(table("jaxpr", written, view, {}, {}), result, target))
    if dump is not None:
        _dump(dump, texts, result, view)
    return result


def check_source(source: str) -> None:
    """Checks that a source is one of `SOURCES`.

    Raises:
      CmxError: The source is unknown.
    """
    if source not in SOURCES:
        raise CmxError(f"source {source!r}, expected one of {', '.join(SOURCES)}")


def _traced(fn: Any, args: Any) -> Any:
    """Traces a function; errors that the function itself raises pass through."""
    try:
        return (fn if hasattr(fn, "trace") else jax.jit(fn)).trace(*args)
    except ValueError as error:
        if advice := placement_advice(error):
            raise CmxError(f"{str(error).split('. ')[0]}; {advice}") from error
        raise


class _timed:  # noqa: N801 (a context manager)
    """Stores how many seconds the block took under a name."""

    def __init__(self, seconds: dict[str, float], name: str):
        self.seconds, self.name = seconds, name

    def __enter__(self) -> None:
        self.began = time.perf_counter()

    def __exit__(self, *_: Any) -> None:
        self.seconds[self.name] = time.perf_counter() - self.began


def _undecided(contents: Contents, args: Any) -> str:
    """Returns a note on the operations that only the compiler splits over the mesh, or ''."""
    split = any(_parts(a) > 1 for a in jax.tree.leaves(args))
    if not split and not (contents.axes and contents.unsplit):
        return ""
    if split and not contents.axes and not contents.unsplit:
        return "arguments are split: the compiler inserts the collectives, which source hlo shows"
    if not contents.unsplit:
        return ""
    named = ", ".join(f"{count} x {name}" for name, count in contents.unsplit.items())
    return (
        f"the compiler splits {named} and inserts collectives, which source hlo shows; here these have the "
        "sizes of all ranks together"
    )


def _placed_bytes(args: Any) -> int:
    """Returns the bytes of one rank's parts of arguments that all say where they lie, else 0."""
    leaves = jax.tree.leaves(args)
    placed = [isinstance(getattr(leaf, "sharding", None), NamedSharding) for leaf in leaves]
    if not leaves or not all(placed):
        return 0
    return sum(array_bytes(a.sharding.shard_shape(a.shape), str(a.dtype)) for a in leaves)


def _parts(arg: Any) -> int:
    """Returns the number of different parts that an argument is split into."""
    sharding = getattr(arg, "sharding", None)
    if not isinstance(sharding, NamedSharding):
        return 1
    return arg.size // max(math.prod(sharding.shard_shape(arg.shape)), 1)


class _Lowered(NamedTuple):
    """A lowered or compiled program.

    Attributes:
      contents: Collectives and products.
      texts: Texts of the program by file name; a text is an object with `as_text`, or a string.
      memory: Bytes of one rank, see `Trace.memory`; empty before compilation.
    """

    contents: Contents
    texts: dict[str, object]
    memory: dict[str, int]


def _lowered(traced: Any, written: Contents, source: str, target: str, seconds: dict[str, float]) -> _Lowered:
    """Lowers a program, and compiles it for source `hlo`.

    Args:
      traced: Traced program.
      written: Contents of its jaxpr.
      source: `stablehlo` or `hlo`.
      target: Target of the compiler.
      seconds: Gets the times `lower` and `compile`.
    """
    try:
        with _timed(seconds, "lower"):
            # StableHLO needs the name of a platform, but no device
            platform = (
                {} if source == "hlo" else {"lowering_platforms": ("cpu" if target == "cpu" else "tpu",)}
            )
            lowered = traced.lower(**platform)
        texts = {"stablehlo.mlir": lowered}
        if source == "stablehlo":
            return _Lowered(read_stablehlo(lowered.compiler_ir("stablehlo")), texts, {})
        with _timed(seconds, "compile"):
            compiled = lowered.compile(compiler_options=compiler_options(target))
    except (ValueError, RuntimeError, NotImplementedError) as error:
        lines = list(filter(None, str(error).splitlines())) or [type(error).__name__]
        reason = " ".join(lines[: 2 if lines[0].endswith(":") else 1])
        raise CmxError(f"the program cannot be compiled for {target}: {reason}") from None
    text, memory = compiled.as_text(), compiled.memory_analysis()
    meshes = written.meshes or [tuple((written.axes or _mesh_of(compiled)).items())]
    program = read_hlo(text, *meshes)
    contents = Contents(
        program.collectives, program.products, written.axes or dict(meshes[0]), meshes, notes=program.notes
    )
    results = memory.output_size_in_bytes - memory.alias_size_in_bytes
    sizes = {"arguments": memory.argument_size_in_bytes, "temporaries": memory.temp_size_in_bytes}
    sizes["results"] = results
    return _Lowered(contents, texts | {"hlo.txt": text}, sizes | {"peak": sum(sizes.values())})


def _mesh_of(compiled: Any) -> dict[str, int]:
    """Returns the axes of the mesh that arguments or results of a program without `shard_map` lie on."""
    for sharding in jax.tree.leaves((compiled.input_shardings, compiled.output_shardings)):
        if isinstance(sharding, NamedSharding) and sharding.mesh.size > 1:
            return dict(sharding.mesh.shape)
    return {}


def _compared(written: Trace, result: Trace, target: str) -> list[str]:
    """Returns notes on the differences between a source and the jaxpr."""
    names = (written.source, result.source)
    lines = differences(_moving(written.collectives), _moving(result.collectives), names, by=("op", "axes"))
    before, after = written.contents, result.contents
    comparable = before.axes and not before.unsplit and not after.unsplit
    for dtype in dict.fromkeys((*written.flops, *result.flops)) if comparable else ():
        flops = [t.flops.get(dtype, 0) for t in (written, result)]
        if flops[0] != flops[1]:
            parts = (f"{name} {scaled(number)}FLOP" for name, number in zip(names, flops, strict=True))
            lines.append(f"products in {dtype}: {', '.join(parts)}")
    types = {x.dtype for x in before.operations}
    if target == "cpu" and result.source == "hlo" and types & {"bfloat16", "float16"}:
        lines.append(
            "XLA:CPU computes and sends bfloat16 as float32: the jaxpr has the bytes that were meant"
        )
    return lines


def _moving(rows: list[Row]) -> list[Row]:
    """Returns the rows of more than one rank: compilers drop collectives of a rank with itself."""
    return [row for row in rows if row["group_size"] > 1 or row["wire_bytes"]]


def _dump(folder: Path, texts: dict[str, object], result: Trace, view: View) -> None:
    """Writes the program's texts and its schedule to a folder."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, text in texts.items():
            plain = text.as_text(debug_info=True) if hasattr(text, "as_text") else str(text)
            (folder / name).write_text(plain)
        write_timeline(folder / "schedule.perfetto.json", result.contents, view)
    except OSError as error:
        raise CmxError(f"--dump {folder}: {error.strerror}; give a folder that can be written") from None
