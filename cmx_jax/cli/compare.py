"""`cmx compare`: layouts of a model side by side."""

import argparse
from typing import Any

from cmx_jax.cli.common import add_json, progress, show


def add(verbs: Any) -> None:
    """Adds the verb and its flags."""
    verb = verbs.add_parser("compare", help="compare layouts: traffic, computation and memory of a step")
    verb.set_defaults(run=_compare)
    verb.add_argument(
        "model", metavar="MODEL", help="checkpoint directory, tiny, or a preset such as deepseek-r1"
    )
    verb.add_argument(
        "--layouts",
        required=True,
        metavar="A,B,...",
        help="layouts to compare, named as for cmx trace, such as ep320,ep160",
    )
    verb.add_argument(
        "--step",
        choices=("decode", "prefill"),
        help="step to trace (default: the one that the first layout is for)",
    )
    verb.add_argument("--batch", type=int, help="sequences per NPU (default: the first layout's)")
    verb.add_argument(
        "--context", type=int, help="tokens per sequence (default 4096, or the model's limit if less)"
    )
    verb.add_argument(
        "--num-speculative-tokens", type=int, default=0, help="MTP drafts per decode step (default 0)"
    )
    sources = "form of the program to read: jaxpr (as written, default), stablehlo, or hlo (as compiled)"
    verb.add_argument("--source", default="jaxpr", help=sources)
    target = "target of the compiler, for --source hlo: cpu (default), or a TPU topology such as v5p:8x8x6"
    verb.add_argument("--target", default="cpu", help=target)
    verb.add_argument(
        "--runner", default="lanes", help="execution of ranks on this machine: lanes (default) or devices"
    )
    verb.add_argument("--html", metavar="FILE", help="write a report with tables and plots to FILE")
    verb.add_argument("--plots", metavar="DIR", help="write the plots to DIR, as PNG and SVG")
    add_json(verb)


def _compare(args: argparse.Namespace) -> None:
    from cmx_jax.analysis.compare import comparison_tables
    from cmx_jax.analysis.compare.layouts import compare
    from cmx_jax.analysis.writing import Destination

    to = Destination(args.html, args.plots)
    names = ("step", "batch", "context", "num_speculative_tokens", "source", "target", "runner")
    chosen = {name: getattr(args, name) for name in names}
    result = compare(args.model, args.layouts.split(","), progress=progress(), **chosen)
    to.write(result)
    show(result.as_dict(), args.json, lambda _: comparison_tables.render(result))
