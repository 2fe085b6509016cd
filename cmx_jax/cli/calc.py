"""`cmx calc`: the paper's side calculations, on the same data as predictions."""

import argparse
from collections.abc import Callable
from typing import Any

from cmx_jax.cli.common import add_json, show
from cmx_jax.errors import CmxError


def add(verbs: Any) -> None:
    """The verb, its two calculations and their flags."""
    verb = verbs.add_parser("calc", help="switching of models; allocation of supernodes")
    which = verb.add_subparsers(dest="calculation", required=True, metavar="CALCULATION")
    one = which.add_parser("switching", help="cold and warm starts of a model by cache (table 2)")
    one.set_defaults(run=_switching)
    model = "a directory, tiny, or a preset such as deepseek-r1 (default)"
    one.add_argument("model", metavar="MODEL", nargs="?", default="deepseek-r1", help=model)
    one.add_argument("--weights", default="int8", help="int8 (default) or bfloat16")
    one.add_argument("--instances", type=int, default=8, help="that start at once (default 8)")
    one.add_argument("--models", type=int, default=8, help="among which they switch (default 8)")
    one.add_argument("--local-models", type=int, default=1, help="that local DRAM keeps (default 1)")
    one.add_argument("--obs-gb-s", type=float, default=2.5, help="of object storage (default 2.5)")
    one.add_argument("--dies", type=int, default=1, help="of an instance that read at once (default 1)")
    add_json(one)
    one = which.add_parser("allocation", help="how full supernodes get; their switches (figure 24, table 11)")
    one.set_defaults(run=_allocation)
    sizes, means = "384,352,288,256,224,192", "10.08,11.28"
    one.add_argument("--supernodes", default=sizes, metavar="N,...", help=f"NPUs of each (default {sizes})")
    one.add_argument("--mean-blocks", default=means, metavar="N,...", help=f"NPUs (default {means})")
    one.add_argument("--largest-block", type=int, default=128, help="NPUs, a power of two (default 128)")
    one.add_argument("--fit", default="best", help="best (default) or first")
    one.add_argument("--blocks", type=int, default=40000, help="that are placed (default 40000)")
    one.add_argument("--seed", type=int, default=0)
    add_json(one)


def _switching(args: argparse.Namespace) -> None:
    from cmx_jax.analysis.calc.switching import model_bytes, render, switching
    from cmx_jax.serving.deploy.model import config_of

    size = model_bytes(config_of(args.model), args.weights)
    names = ("instances", "models", "local_models", "obs_gb_s", "dies")
    found = switching(size, **{name: getattr(args, name) for name in names})
    show({"model": args.model, "weights": args.weights, **found}, args.json, render)


def _allocation(args: argparse.Namespace) -> None:
    from cmx_jax.analysis.calc.allocation import allocation, render

    supernodes = _numbers("--supernodes", args.supernodes, int)
    means = _numbers("--mean-blocks", args.mean_blocks, float)
    given = {"largest": args.largest_block, "fit": args.fit, "blocks": args.blocks, "seed": args.seed}
    show(allocation(supernodes, means, **given), args.json, render)


def _numbers(flag: str, text: str, kind: Callable[[str], Any]) -> list[Any]:
    try:
        return [kind(part) for part in text.split(",")]
    except ValueError:
        raise CmxError(f"{flag} is {text!r}, expected numbers such as 384,224") from None
