"""`cmx compare`."""

import argparse
from typing import Any

from cmx_jax.cli.common import add_json, progress, show


def add(verbs: Any) -> None:
    """The verb and its flags."""
    verb = verbs.add_parser("compare", help="layouts side by side: what a step moves, computes and holds")
    verb.set_defaults(run=_compare)
    verb.add_argument("model", metavar="MODEL", help="a directory, tiny, or a preset such as deepseek-r1")
    verb.add_argument(
        "--layouts", required=True, metavar="A,B,...", help="as of cmx trace, such as ep320,ep160"
    )
    verb.add_argument("--step", choices=("decode", "prefill"), help="default: what the first layout is for")
    verb.add_argument("--batch", type=int, help="sequences of an NPU (default: the first layout's)")
    verb.add_argument(
        "--context", type=int, help="tokens of a sequence (default 4096, or the model's if less)"
    )
    verb.add_argument("--num-speculative-tokens", type=int, default=0, help="MTP drafts (default 0)")
    sources = "jaxpr (what was written, default), stablehlo, or hlo (what the compiler made of it)"
    verb.add_argument("--source", default="jaxpr", help=sources)
    target = "for hlo: cpu (default) or a TPU topology such as v5p:8x8x6"
    verb.add_argument("--target", default="cpu", help=target)
    verb.add_argument(
        "--runner", default="lanes", help="what a step runs on here: lanes (default) or devices"
    )
    verb.add_argument("--html", metavar="FILE", help="a report of one page, tables and plots")
    verb.add_argument("--plots", metavar="DIR", help="plots, each as PNG and SVG")
    add_json(verb)


def _compare(args: argparse.Namespace) -> None:
    from cmx_jax.analysis.compare import report
    from cmx_jax.analysis.compare.layouts import compare
    from cmx_jax.analysis.writing import Destination

    to = Destination(args.html, args.plots)
    names = ("step", "batch", "context", "num_speculative_tokens", "source", "target", "runner")
    chosen = {name: getattr(args, name) for name in names}
    result = compare(args.model, args.layouts.split(","), progress=progress(), **chosen)
    to.write(result)
    show(result.as_dict(), args.json, lambda _: report.render(result))
