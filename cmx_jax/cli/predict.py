"""`cmx predict`: what a step would cost on a machine, and the paper's figures beside their predictions."""

import argparse
from typing import Any

from cmx_jax.cli.common import add_json, show
from cmx_jax.errors import CmxError


def add(verbs: Any) -> None:
    """The verb and its flags."""
    verb = verbs.add_parser("predict", help="what a step would cost on a machine, from the traced program")
    verb.set_defaults(run=_predict)
    model = "a directory, tiny, or a preset such as deepseek-r1"
    verb.add_argument("model", metavar="MODEL", nargs="?", default="deepseek-r1", help=model)
    verb.add_argument("--paper", action="store_true", help="every published figure beside its prediction")
    verb.add_argument("--hardware", default="cloudmatrix384", help="cloudmatrix384 (default), h800 or h100")
    verb.add_argument("--layout", default="ep320", help="as of cmx trace (default ep320)")
    verb.add_argument("--step", choices=("decode", "prefill"), help="default: what the layout is for")
    verb.add_argument("--batch", type=int, help="sequences of an NPU (default: the layout's)")
    verb.add_argument("--context", type=int, default=4096, help="tokens of a sequence (default 4096)")
    verb.add_argument("--microbatches", type=int, default=2, help="streams of a step (default 2)")
    verb.add_argument("--num-speculative-tokens", type=int, default=1, help="MTP drafts (default 1)")
    verb.add_argument("--mtp-acceptance", type=float, default=0.7, help="of a draft (default 0.7)")
    busiest = "load of the busiest expert rank over the mean (default: what chance makes of even experts)"
    verb.add_argument("--imbalance", type=float, help=busiest)
    verb.add_argument("--sensitivity", action="store_true", help="the step with each constant 10 %% larger")
    verb.add_argument("--plots", metavar="DIR", help="with --paper: the errors, as PNG and SVG")
    add_json(verb)


def _predict(args: argparse.Namespace) -> None:
    from dataclasses import replace

    from cmx_jax.analysis.plan.figures import Folder, paper_errors
    from cmx_jax.analysis.predict import paper
    from cmx_jax.analysis.predict.predict import predict, render, sensitivity
    from cmx_jax.mesh.named_layouts import named_layout
    from cmx_jax.serving.deploy.model import config_of

    if args.plots and not args.paper:
        raise CmxError("--plots is given without --paper: give both")
    if args.paper:
        to, rows = Folder(args.plots), paper.paper()
        if args.plots:
            to.write("paper", paper_errors(rows))
        show(rows, args.json, paper.render)
        return
    c, found = config_of(args.model), named_layout(args.layout)
    if found.ranks_per_npu == 1 and args.hardware == "cloudmatrix384":
        raise CmxError(
            f"layout {args.layout} has one rank an NPU; a cloudmatrix384 rank is a die, as of ep320"
        )
    layout = replace(found.make(c.n_routed_experts), microbatches=args.microbatches)
    given: dict[str, Any] = {
        "batch": found.batch if args.batch is None else args.batch,
        "context": args.context,
        "drafts": args.num_speculative_tokens,
        "mtp_acceptance": args.mtp_acceptance,
        "imbalance": args.imbalance,
    }
    step = args.step or found.step
    result = predict(c, args.hardware, layout, step, **given)
    if args.sensitivity:
        result["sensitivity"] = sensitivity(c, args.hardware, layout, step, **given)
    show(
        {"model": args.model, "layout": args.layout, **result},
        args.json,
        lambda r: _rendered(r, render(result)),
    )


def _rendered(result: dict[str, Any], text: str) -> str:
    rows = result.get("sensitivity", [])
    lines = [f"{r['constant']:24}{r['value']:>10g} {r['unit']:<16}{r['change']:+8.2%}" for r in rows]
    return "\n".join([text, *(["", "each constant 10 % larger: the step's time", *lines] if lines else [])])
