"""`cmx predict`: predicts a step's time on a machine, or the figures that the paper published."""

import argparse
from typing import Any

from cmx_jax.cli.common import add_json, show
from cmx_jax.errors import CmxError


def add(verbs: Any) -> None:
    """Adds the verb and its flags."""
    verb = verbs.add_parser("predict", help="predict a step's time on a machine, from the traced program")
    verb.set_defaults(run=_predict)
    model = "directory, tiny, or a preset such as deepseek-r1 (default)"
    verb.add_argument("model", metavar="MODEL", nargs="?", default="deepseek-r1", help=model)
    verb.add_argument(
        "--paper", action="store_true", help="show every published figure beside its prediction"
    )
    verb.add_argument("--hardware", default="cloudmatrix384", help="cloudmatrix384 (default), h800 or h100")
    verb.add_argument("--layout", default="ep320", help="name of a layout, see cmx trace (default ep320)")
    verb.add_argument("--step", choices=("decode", "prefill"), help="kind of step (default: the layout's)")
    verb.add_argument("--batch", type=int, help="sequences per NPU (default: the layout's)")
    verb.add_argument("--context", type=int, default=4096, help="tokens of each sequence (default 4096)")
    verb.add_argument("--microbatches", type=int, default=2, help="streams of a step (default 2)")
    verb.add_argument("--num-speculative-tokens", type=int, default=1, help="MTP drafts (default 1)")
    acceptance = "probability that a draft is right (default 0.7)"
    verb.add_argument("--mtp-acceptance", type=float, default=0.7, help=acceptance)
    imbalance = "load of the busiest expert rank relative to the mean (default: chance, with even experts)"
    verb.add_argument("--imbalance", type=float, help=imbalance)
    sensitivity = "show the change of the step's time if each constant is 10 %% larger"
    verb.add_argument("--sensitivity", action="store_true", help=sensitivity)
    verb.add_argument("--plots", metavar="DIR", help="folder for --paper's errors, as PNG and SVG")
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

    from cmx_jax.analysis.predict.predict import predict, render, sensitivity
    from cmx_jax.mesh.named_layouts import ready
    from cmx_jax.serving.deploy.model import config_of

    c, named = config_of(args.model), ready(args.layout)
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
