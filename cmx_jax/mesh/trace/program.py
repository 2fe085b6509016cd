"""What a program moves and computes, from one of three sources: its jaxpr, its StableHLO, its optimised HLO.

The jaxpr is what was written, StableHLO what the compiler is given, HLO what it made of it for one target.
In that order they are trusted to say what was meant; where they differ, that is said.
"""

import math
import time
from pathlib import Path
from typing import Any

import jax
from jax.sharding import NamedSharding

from cmx_jax.errors import CmxError
from cmx_jax.mesh.jax_versions import placement_advice
from cmx_jax.mesh.targets import compiler_options
from cmx_jax.mesh.trace.differences import differences
from cmx_jax.mesh.trace.hlo.reader import read_hlo
from cmx_jax.mesh.trace.jaxpr import read_jaxpr
from cmx_jax.mesh.trace.ops.contents import Found
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
    """Traces a function of any arguments (arrays, or `jax.ShapeDtypeStruct`s); nothing is computed.

    Args:
      fn: jitted or not, with `shard_map` inside or shardings for the compiler to decide (GSPMD); or what
        `jax.jit(fn).trace(...)` returns.
      args: its arguments.
      source: one of `SOURCES`. For `hlo` the mesh must be of devices: of CPU, or of a topology
        (`cmx_jax.mesh.targets.target_devices`). Only there are collectives that the compiler inserts.
      target: what it is compiled for, a name in the sense of `target_devices`.
      dump: a folder for the program's texts, and its schedule as a trace for ui.perfetto.dev.
      view: where ranks sit, and what is useful of what they move.

    Raises:
      CmxError: the source is unknown, the program cannot be compiled, or `shard_map` refuses an argument that
        does not lie on a mesh of `Explicit` axes as it should. Other errors of the function go through.
    """
    if source not in SOURCES:
        raise CmxError(f"source {source!r}, expected one of {', '.join(SOURCES)}")
    seconds: dict[str, float] = {}
    with _timed(seconds, "trace"):
        traced = fn if hasattr(fn, "jaxpr") else _traced(fn, args)
        asked = found = read_jaxpr(traced.jaxpr)
    memory, texts = ({"arguments": asked.arguments} if asked.arguments else {}), {"jaxpr.txt": traced.jaxpr}
    if source != "jaxpr":
        found, more, memory_of = _lowered(traced, asked, source, target, seconds)
        texts, memory = texts | more, memory | memory_of
    if source == "stablehlo":
        found.notes.extend(asked.notes)
    if source != "hlo" and (note := _undecided(found, args)):
        found.notes.append(note)
    result = table(source, found, view, memory, seconds)
    if source != "jaxpr":
        result.notes.extend(_compared(table("jaxpr", asked, view, {}, {}), result, target))
    if dump is not None:
        _dump(dump, texts, result, view)
    return result


def _traced(fn: Any, args: Any) -> Any:
    """Traces a function; what it raises itself is the caller's to see."""
    try:
        return (fn if hasattr(fn, "trace") else jax.jit(fn)).trace(*args)
    except ValueError as error:
        if advice := placement_advice(error):
            raise CmxError(f"{str(error).split('. ')[0]}; {advice}") from error
        raise


class _timed:  # noqa: N801 (a context manager)
    """Notes how long something took."""

    def __init__(self, seconds: dict[str, float], name: str):
        self.seconds, self.name = seconds, name

    def __enter__(self) -> None:
        self.began = time.perf_counter()

    def __exit__(self, *_: Any) -> None:
        self.seconds[self.name] = time.perf_counter() - self.began


def _undecided(found: Found, args: Any) -> str:
    """Says of which operations only the compiler knows how they are split over the mesh, or ''."""
    split = any(_parts(a) > 1 for a in jax.tree.leaves(args))
    if not split and not (found.axes and found.whole):
        return ""
    if split and not found.axes and not found.whole:
        return "arguments are split: the compiler inserts the collectives, which source hlo shows"
    if not found.whole:
        return ""
    named = ", ".join(f"{count} x {name}" for name, count in found.whole.items())
    return (
        f"the compiler splits {named} and inserts collectives, which source hlo shows; here these have the "
        "sizes of all ranks together"
    )


def _parts(arg: Any) -> int:
    """Into how many different parts an argument is split."""
    sharding = getattr(arg, "sharding", None)
    if not isinstance(sharding, NamedSharding):
        return 1
    return arg.size // max(math.prod(sharding.shard_shape(arg.shape)), 1)


def _lowered(
    traced: Any, asked: Found, source: str, target: str, seconds: dict[str, float]
) -> tuple[Found, dict[str, Any], dict[str, int]]:
    """What StableHLO or HLO holds, the texts, and memory."""
    try:
        with _timed(seconds, "lower"):
            # nothing but the platform is needed for StableHLO, no device
            platform = (
                {} if source == "hlo" else {"lowering_platforms": ("cpu" if target == "cpu" else "tpu",)}
            )
            lowered = traced.lower(**platform)
        texts = {"stablehlo.mlir": lowered}
        if source == "stablehlo":
            return read_stablehlo(lowered.compiler_ir("stablehlo")), texts, {}
        with _timed(seconds, "compile"):
            compiled = lowered.compile(compiler_options=compiler_options(target))
    except (ValueError, RuntimeError, NotImplementedError) as error:
        reason = next(filter(None, str(error).splitlines()), type(error).__name__)
        raise CmxError(f"the program cannot be compiled for {target}: {reason}") from None
    text, memory = compiled.as_text(), compiled.memory_analysis()
    axes = asked.axes or _mesh_of(compiled)
    program = read_hlo(text, tuple(axes.items()))
    found = Found(program.collectives, program.products, axes, program.notes)
    results = memory.output_size_in_bytes - memory.alias_size_in_bytes
    sizes = {"arguments": memory.argument_size_in_bytes, "temporaries": memory.temp_size_in_bytes}
    sizes["results"] = results
    return found, texts | {"hlo.txt": text}, sizes | {"peak": sum(sizes.values())}


def _mesh_of(compiled: Any) -> dict[str, int]:
    """Of a program without `shard_map`: the mesh that its arguments lie on."""
    for sharding in jax.tree.leaves((compiled.input_shardings, compiled.output_shardings)):
        if isinstance(sharding, NamedSharding) and sharding.mesh.size > 1:
            return dict(sharding.mesh.shape)
    return {}


def _compared(asked: Trace, result: Trace, target: str) -> list[str]:
    """Where the source and the jaxpr do not agree."""
    names = (asked.source, result.source)
    found = differences(asked.collectives, result.collectives, names, by=("op", "axes"))
    decided = asked.found.axes and not asked.found.whole and not result.found.whole
    for dtype in dict.fromkeys((*asked.flops, *result.flops)) if decided else ():
        flops = [t.flops.get(dtype, 0) for t in (asked, result)]
        if flops[0] != flops[1]:
            said = (f"{name} {scaled(of)}FLOP" for name, of in zip(names, flops, strict=True))
            found.append(f"products in {dtype}: {', '.join(said)}")
    types = {x.dtype for x in (*asked.found.collectives, *asked.found.products)}
    if target == "cpu" and result.source == "hlo" and types & {"bfloat16", "float16"}:
        found.append(
            "XLA:CPU computes and sends bfloat16 as float32: the jaxpr has the bytes that were meant"
        )
    return found


def _dump(folder: Path, texts: dict[str, Any], result: Trace, view: View) -> None:
    """Writes what there is."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, text in texts.items():
            written = text.as_text(debug_info=True) if hasattr(text, "as_text") else str(text)
            (folder / name).write_text(written)
        write_timeline(folder / "schedule.perfetto.json", result.found, view)
    except OSError as error:
        raise CmxError(f"--dump {folder}: {error.strerror}; give a folder that can be written") from None
