"""`cmx plan`: search for the deployment that serves a load within an SLO."""

import argparse
from typing import Any

from cmx_jax.cli.common import add_json, progress, show


def add(verbs: Any) -> None:
    """Adds the verb and its flags."""
    verb = verbs.add_parser("plan", help="find the deployment that serves a load within an SLO")
    verb.set_defaults(run=_plan)
    model = "checkpoint directory, tiny, or a preset (default deepseek-r1)"
    verb.add_argument("model", metavar="MODEL", nargs="?", default="deepseek-r1", help=model)
    verb.add_argument("--prompt", type=int, required=True, help="tokens per prompt")
    verb.add_argument("--output", type=int, required=True, help="tokens per answer")
    verb.add_argument(
        "--slo-ttft-ms", type=float, required=True, help="limit of the time to the first token, in ms"
    )
    verb.add_argument(
        "--slo-tpot-ms", type=float, required=True, help="limit of the time per output token, in ms"
    )
    verb.add_argument("--rate", type=float, help="requests per second (default: as many as possible)")
    verb.add_argument(
        "--hardware", default="cloudmatrix384", help="machine: cloudmatrix384 (default), h800 or h100"
    )
    verb.add_argument("--npus", type=int, default=384, help="number of NPUs available (default 384)")
    verb.add_argument(
        "--mtp-acceptance", type=float, default=0.7, help="probability that a draft is accepted (default 0.7)"
    )
    verb.add_argument(
        "--plots", metavar="DIR", help="plot the candidates and their Pareto front in DIR, as PNG and SVG"
    )
    add_json(verb)


def _plan(args: argparse.Namespace) -> None:
    from cmx_jax.analysis.plan.figures import Folder, front
    from cmx_jax.analysis.plan.plan import plan, render
    from cmx_jax.analysis.predict.plan_request import PlanRequest, Workload
    from cmx_jax.serving.deploy.model import config_of

    folder = Folder(args.plots)
    request = PlanRequest(
        workload=Workload(args.prompt, args.output, args.slo_ttft_ms, args.slo_tpot_ms),
        config=config_of(args.model),
        hardware=args.hardware,
        npus=args.npus,
        rate=args.rate,
        mtp_acceptance=args.mtp_acceptance,
    )
    result = plan(request, progress=progress())
    if args.plots:
        folder.write("plan", front(result))
    show(result.as_dict(), args.json, lambda _: render(result))
