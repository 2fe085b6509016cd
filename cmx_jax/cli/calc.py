"""`cmx calc`: the paper's side calculations, on the same data as predictions."""

import argparse
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

from cmx_jax.cli.common import add_json, show
from cmx_jax.errors import CmxError


def add(verbs: Any) -> None:
    """Adds the verb, its two calculations and their flags."""
    verb = verbs.add_parser("calc", help="calculate times to switch models, or how full supernodes get")
    calculations = verb.add_subparsers(dest="calculation", required=True, metavar="CALCULATION")
    _add_switching(calculations)
    _add_allocation(calculations)


def _add_switching(calculations: Any) -> None:
    verb = calculations.add_parser("switching", help="cold and warm starts of a model by cache (table 2)")
    verb.set_defaults(run=_switching)
    model = "a checkpoint directory, tiny, or a preset such as deepseek-r1 (default)"
    verb.add_argument("model", metavar="MODEL", nargs="?", default="deepseek-r1", help=model)
    verb.add_argument("--weights", default="int8", help="type of the weights: int8 (default) or bfloat16")
    verb.add_argument("--instances", type=int, default=8, help="instances that start at once (default 8)")
    verb.add_argument("--models", type=int, default=8, help="models that instances switch among (default 8)")
    verb.add_argument("--local-models", type=int, default=1, help="models kept in local DRAM (default 1)")
    verb.add_argument("--obs-gb-s", type=float, default=2.5, help="GB/s of object storage (default 2.5)")
    dies = "dies per instance that read DRAM at once (default 1)"
    verb.add_argument("--dies", type=int, default=1, help=dies)
    add_json(verb)


def _add_allocation(calculations: Any) -> None:
    about = "allocation rate of supernodes by size, and their switches (figure 24, table 11)"
    verb = calculations.add_parser("allocation", help=about)
    verb.set_defaults(run=_allocation)
    sizes, means = "384,352,288,256,224,192", "10.08,11.28"
    verb.add_argument(
        "--supernodes", default=sizes, metavar="N,...", help=f"sizes of supernodes, in NPUs (default {sizes})"
    )
    verb.add_argument(
        "--mean-blocks",
        default=means,
        metavar="N,...",
        help=f"mean sizes of a block, in NPUs (default {means})",
    )
    largest = "NPUs of the largest block, a power of two (default 128)"
    verb.add_argument("--largest-block", type=int, default=128, help=largest)
    policy = "supernode for a block: the fullest (best, default) or the first (first) that has space"
    verb.add_argument("--fit", default="best", help=policy)
    verb.add_argument("--blocks", type=int, default=40000, help="blocks to place (default 40000)")
    verb.add_argument("--seed", type=int, default=0, help="seed of sizes and durations (default 0)")
    add_json(verb)


def _switching(args: argparse.Namespace) -> None:
    from cmx_jax.analysis.calc.switching import model_bytes, render, switching
    from cmx_jax.serving.deploy.model import config_of

    result = switching(
        model_bytes(config_of(args.model), args.weights),
        instances=args.instances,
        models=args.models,
        local_models=args.local_models,
        obs_gb_s=args.obs_gb_s,
        dies=args.dies,
    )
    document = {"model": args.model, "weights": args.weights, **result.as_dict()}
    show(document, args.json, lambda _: render(result))


def _allocation(args: argparse.Namespace) -> None:
    from cmx_jax.analysis.calc.allocation import Assumptions, allocation, render

    supernodes = _numbers("--supernodes", args.supernodes, int)
    means = _numbers("--mean-blocks", args.mean_blocks, float)
    assumed = Assumptions(args.largest_block, args.fit, args.blocks, args.seed)
    result = allocation(supernodes, means, assumed)
    show(asdict(result), args.json, lambda _: render(result))


def _numbers(flag: str, text: str, kind: Callable[[str], Any]) -> list[Any]:
    try:
        return [kind(part) for part in text.split(",")]
    except ValueError:
        raise CmxError(f"{flag} is {text!r}, expected numbers such as 384,224") from None
