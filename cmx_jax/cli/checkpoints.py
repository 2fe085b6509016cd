"""`cmx inspect`, `cmx convert` and `cmx quantize`: checkpoints as files."""

import argparse
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from cmx_jax.cli.common import add_json, progress, show
from cmx_jax.errors import CmxError

if TYPE_CHECKING:  # these take seconds to import
    from cmx_jax.model.checkpoint.convert import Conversion
    from cmx_jax.model.quantize.command import Quantization

_DESTINATION = "a new directory, or one in which the same command was interrupted"


def add(verbs: Any) -> None:
    """Adds the verbs and their flags."""
    for add_verb in (_add_inspect, _add_convert, _add_quantize):
        add_json(add_verb(verbs))


def _add_inspect(verbs: Any) -> argparse.ArgumentParser:
    verb: argparse.ArgumentParser = verbs.add_parser(
        "inspect", help="list the tensors of a checkpoint and its problems"
    )
    verb.set_defaults(run=_inspect)
    verb.add_argument(
        "model", metavar="SRC", help="a checkpoint directory, tiny, or a preset such as deepseek-r1"
    )
    return verb


def _add_convert(verbs: Any) -> argparse.ArgumentParser:
    verb: argparse.ArgumentParser = verbs.add_parser(
        "convert", help="convert a checkpoint to safetensors or Orbax; run again to resume"
    )
    verb.set_defaults(run=_convert)
    verb.add_argument("source", metavar="SRC", help="a Hugging Face or Orbax directory, or tiny")
    verb.add_argument("destination", metavar="DST", help=_DESTINATION)
    verb.add_argument(
        "--format", default="safetensors", help="format to write: safetensors (default) or orbax"
    )
    verb.add_argument("--dtype", help="type to write: bfloat16, float32 or int8 (default: as stored)")
    layout = "expert layout of an Orbax directory, such as ep320 for 320 ranks (default ep1)"
    verb.add_argument("--layout", type=_layout, help=layout)
    return verb


def _add_quantize(verbs: Any) -> argparse.ArgumentParser:
    verb: argparse.ArgumentParser = verbs.add_parser(
        "quantize", help="quantize a checkpoint to INT8 (W8A8); run again to resume"
    )
    verb.set_defaults(run=_quantize)
    verb.add_argument("source", metavar="SRC", help="a Hugging Face or Orbax directory, or tiny")
    verb.add_argument("destination", metavar="DST", help=_DESTINATION)
    text = "UTF-8 calibration text (default: Python's documentation)"
    verb.add_argument("--calibration", metavar="FILE", help=text)
    tokens = "tokens of the calibration text to use (default 4096)"
    verb.add_argument("--calibration-tokens", type=int, default=4096, help=tokens)
    schemes = (
        "parts to apply: full (default), plain, or some of precision,scales,rotation,clipping,compensation"
    )
    verb.add_argument("--scheme", default="full", help=schemes)
    share = "share of the INT8 bytes to spend on fields kept in floats (default 0.08)"
    verb.add_argument("--budget", type=float, default=0.08, help=share)
    return verb


def _layout(text: str) -> int:
    """Parses `ep320` to 320 ranks."""
    if not (text.startswith("ep") and text[2:].isdecimal()):
        raise argparse.ArgumentTypeError(f"layout {text!r}, expected ep and a number of ranks, such as ep320")
    return int(text[2:])


def _inspect(args: argparse.Namespace) -> None:
    from cmx_jax.model.checkpoint.inspect import inspect, render
    from cmx_jax.serving.deploy.model import located

    result = inspect(located(args.model))
    show(asdict(result), args.json, lambda _: render(result))
    if result.problems:
        count = f" (and {len(result.problems) - 1} more)" if len(result.problems) > 1 else ""
        raise CmxError(f"{args.model}: {result.problems[0]}{count}")


def _convert(args: argparse.Namespace) -> None:
    from cmx_jax.model.checkpoint.convert import convert
    from cmx_jax.serving.deploy.model import locate

    result = convert(
        locate(args.source),
        args.destination,
        format=args.format,
        dtype=args.dtype,
        ranks=args.layout,
        progress=progress(),
    )
    show(asdict(result), args.json, lambda _: _render_conversion(result))


def _render_conversion(r: "Conversion") -> str:
    units = _units(r.units, r.units_resumed)
    return (
        f"{r.destination}: {r.format}, {r.dtype}: {r.tensors:,} tensors in {units}, "
        f"{r.bytes:,} bytes; every tensor was read again and its sha256 is right"
    )


def _units(count: int, resumed: int) -> str:
    return f"{count} units" + (f" ({resumed} were there already)" if resumed else "")


def _quantize(args: argparse.Namespace) -> None:
    from cmx_jax.mesh import enable_compilation_cache
    from cmx_jax.model.quantize.command import quantize
    from cmx_jax.model.quantize.layer import PARTS
    from cmx_jax.serving.deploy.model import Model, locate

    enable_compilation_cache()
    names = {"full": ",".join(PARTS), "plain": ""}.get(args.scheme, args.scheme)
    parts, tell, tokens = frozenset(filter(None, names.split(","))), progress(), None
    if parts:
        from cmx_jax.analysis.eval.calibration import calibration

        tell("reading the calibration text")
        tokens = calibration(Model.read(args.source), args.calibration, args.calibration_tokens)
    source = locate(args.source)
    result = quantize(source, args.destination, tokens=tokens, parts=parts, budget=args.budget, progress=tell)
    show(result.as_dict(), args.json, lambda _: _render_quantization(result))


def _render_quantization(r: "Quantization") -> str:
    rows = [
        f"{unit:<12} {matrix:<22} {error.plain:9.3%} {error.written:9.3%} {error.clipped:9.1%}"
        for unit, matrices in r.layers.items()
        for matrix, error in matrices.items()
    ]
    titles = f"{'':<12} {'error of products':<22} {'rounding':>9} {'written':>9} {'clipped':>9}"
    head = [titles] if rows else []
    parts = ", ".join(r.parts) or "rounding alone"
    kept = ", ".join(r.kept) or "only fields that are never INT8"
    last = (
        f"{r.destination}: INT8 by {parts}, {r.calibration_tokens:,} calibration tokens, "
        f"{_units(r.units, r.units_resumed)}, {r.bytes:,} bytes; in floats: {kept}"
    )
    return "\n".join([*head, *rows, last])
