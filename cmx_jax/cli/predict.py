"""`cmx predict`: the predicted cost of a step on a machine, and predictions of the paper's figures."""

import argparse
from typing import Any

from cmx_jax.cli.common import add_json, show
from cmx_jax.errors import CmxError


def add(verbs: Any) -> None:
    """Adds the verb and its flags."""
    verb = verbs.add_parser("predict", help="predict the cost of a step on a machine from the traced program")
    verb.set_defaults(run=_predict)
    model = "checkpoint directory, tiny, or a preset (default deepseek-r1)"
    verb.add_argument("model", metavar="MODEL", nargs="?", default="deepseek-r1", help=model)
    verb.add_argument(
        "--paper", action="store_true", help="show every published figure beside its prediction"
    )
    verb.add_argument(
        "--hardware", default="cloudmatrix384", help="machine: cloudmatrix384 (default), h800 or h100"
    )
    verb.add_argument("--layout", default="ep320", help="layout, named as for cmx trace (default ep320)")
    verb.add_argument(
        "--step",
        choices=("decode", "prefill"),
        help="step to predict (default: the one that the layout is for)",
    )
    verb.add_argument("--batch", type=int, help="sequences per NPU (default: the layout's)")
    verb.add_argument("--context", type=int, default=4096, help="tokens per sequence (default 4096)")
    verb.add_argument("--microbatches", type=int, default=2, help="microbatches per step (default 2)")
    verb.add_argument(
        "--num-speculative-tokens", type=int, default=1, help="MTP drafts per decode step (default 1)"
    )
    verb.add_argument(
        "--mtp-acceptance", type=float, default=0.7, help="probability that a draft is accepted (default 0.7)"
    )
    busiest = "load of the busiest expert rank over the mean (default: expected for equally likely experts)"
    verb.add_argument("--imbalance", type=float, help=busiest)
    verb.add_argument(
        "--sensitivity", action="store_true", help="show the step time with each constant 10 %% larger"
    )
    verb.add_argument("--plots", metavar="DIR", help="plot the errors in DIR, as PNG and SVG; needs --paper")
    add_json(verb)


def _predict(args: argparse.Namespace) -> None:
    if args.plots and not args.paper:
        raise CmxError("--plots is given without --paper: give both")
    if args.paper:
        _paper(args)
    else:
        _step(args)


def _paper(args: argparse.Namespace) -> None:
    from cmx_jax.analysis.plan.figures import Folder, paper_errors
    from cmx_jax.analysis.predict.paper import paper, render

    folder, report = Folder(args.plots), paper()
    if args.plots:
        folder.write("paper", paper_errors(report))
    show(report.as_dict(), args.json, lambda _: render(report))


def _step(args: argparse.Namespace) -> None:
    from dataclasses import asdict, replace

    from cmx_jax.analysis.predict.predict import predict, sensitivity
    from cmx_jax.analysis.predict.prediction import render
    from cmx_jax.mesh.named_layouts import named_layout
    from cmx_jax.serving.deploy.model import config_of

    c, named = config_of(args.model), named_layout(args.layout)
    if named.ranks_per_npu == 1 and args.hardware == "cloudmatrix384":
        raise CmxError(
            f"layout {args.layout} has one rank an NPU; a cloudmatrix384 rank is a die, as of ep320"
        )
    layout = replace(named.make(c.n_routed_experts), microbatches=args.microbatches)
    sizes: dict[str, Any] = {
        "batch": named.batch if args.batch is None else args.batch,
        "context": args.context,
        "drafts": args.num_speculative_tokens,
        "mtp_acceptance": args.mtp_acceptance,
        "imbalance": args.imbalance,
    }
    step = args.step or named.step
    prediction = predict(c, args.hardware, layout, step, **sizes)
    document, text = {"model": args.model, "layout": args.layout, **prediction.as_dict()}, render(prediction)
    if args.sensitivity:
        rows = sensitivity(c, args.hardware, layout, step, **sizes)
        document["sensitivity"] = [asdict(row) for row in rows]
        lines = [f"{r.constant:24}{r.value:>10g} {r.unit:<16}{r.change:+8.2%}" for r in rows]
        text = "\n".join([text, "", "each constant 10 % larger: the step's time", *lines])
    show(document, args.json, lambda _: text)
