"""`cmx inspect`, `cmx convert` and `cmx quantize`: checkpoints as files."""

import argparse
from typing import Any

from cmx_jax.cli.common import add_json, progress, show
from cmx_jax.errors import CmxError


def add(verbs: Any) -> None:
    """The verbs and their flags."""
    inspect = verbs.add_parser("inspect", help="what a checkpoint holds, and what is wrong with it")
    inspect.set_defaults(run=_inspect)
    inspect.add_argument("model", metavar="SRC", help="a directory, tiny, or a preset such as deepseek-r1")

    convert = verbs.add_parser("convert", help="to safetensors or Orbax, resuming what stopped")
    convert.set_defaults(run=_convert)
    convert.add_argument("source", metavar="SRC", help="a Hugging Face or Orbax directory, or tiny")
    convert.add_argument("destination", metavar="DST", help="a new directory, or one that was begun")
    convert.add_argument("--format", default="safetensors", help="safetensors (default) or orbax")
    convert.add_argument("--dtype", help="bfloat16, float32 or int8 (default: as stored)")
    convert.add_argument("--layout", type=_layout, help="whose slots an Orbax directory has, such as ep320")

    quantize = verbs.add_parser("quantize", help="to INT8 (W8A8), layer by layer, resuming what stopped")
    quantize.set_defaults(run=_quantize)
    quantize.add_argument("source", metavar="SRC", help="a checkpoint, or tiny")
    quantize.add_argument("destination", metavar="DST", help="a new directory, or one that was begun")
    text = "UTF-8 text (default: Python's documentation)"
    quantize.add_argument("--calibration", metavar="FILE", help=text)
    quantize.add_argument("--calibration-tokens", type=int, default=4096, help="how many (default 4096)")
    schemes = "full (default), plain, or some of precision,scales,rotation,clipping,compensation"
    quantize.add_argument("--scheme", default="full", help=schemes)
    share = "of the bytes, for precision (default 0.08)"
    quantize.add_argument("--budget", type=float, default=0.08, help=share)
    for verb in (inspect, convert, quantize):
        add_json(verb)


def _layout(text: str) -> int:
    """`ep320` to 320 ranks."""
    if not (text.startswith("ep") and text[2:].isdecimal()):
        raise argparse.ArgumentTypeError(f"layout {text!r}, expected ep and a number of ranks, such as ep320")
    return int(text[2:])


def _inspect(args: argparse.Namespace) -> None:
    from cmx_jax.model.checkpoint import inspect
    from cmx_jax.serving.deploy.model import located

    result = inspect.inspect(located(args.model))
    show(result, args.json, inspect.render)
    if result["problems"]:
        more = f" (and {len(result['problems']) - 1} more)" if len(result["problems"]) > 1 else ""
        raise CmxError(f"{args.model}: {result['problems'][0]}{more}")


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
    show(result, args.json, _render_conversion)


def _render_conversion(r: dict[str, Any]) -> str:
    before = f" ({r['units_resumed']} were there already)" if r["units_resumed"] else ""
    return (
        f"{r['destination']}: {r['format']}, {r['dtype']}: {r['tensors']:,} tensors in {r['units']} units"
        f"{before}, {r['bytes']:,} bytes; every tensor was read again and its sha256 is right"
    )


def _quantize(args: argparse.Namespace) -> None:
    from cmx_jax.mesh import enable_compilation_cache
    from cmx_jax.model.quantize.command import PARTS, quantize
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
    show(result, args.json, _render_quantization)


def _render_quantization(r: dict[str, Any]) -> str:
    rows = [
        f"{unit:<12} {matrix:<22} {errors['plain']:9.3%} {errors['written']:9.3%} {errors['clipped']:9.1%}"
        for unit, found in r["layers"].items()
        for matrix, errors in found.items()
    ]
    titles = f"{'':<12} {'error of products':<22} {'rounding':>9} {'written':>9} {'clipped':>9}"
    head = [titles] if rows else []
    parts = ", ".join(r["parts"]) or "rounding alone"
    before = f" ({r['units_resumed']} were there already)" if r["units_resumed"] else ""
    kept = ", ".join(r["kept"]) or "what always is"
    last = (
        f"{r['destination']}: INT8 by {parts}, {r['calibration_tokens']:,} calibration tokens, {r['units']} "
        f"units{before}, {r['bytes']:,} bytes; in floats: {kept}"
    )
    return "\n".join([*head, *rows, last])
