"""`cmx plan`: which deployment serves a load within an SLO."""

import argparse
from typing import Any

from cmx_jax.cli.common import add_json, progress, show


def add(verbs: Any) -> None:
    """The verb and its flags."""
    verb = verbs.add_parser("plan", help="which deployment serves a load within an SLO")
    verb.set_defaults(run=_plan)
    model = "a directory, tiny, or a preset such as deepseek-r1"
    verb.add_argument("model", metavar="MODEL", nargs="?", default="deepseek-r1", help=model)
    verb.add_argument("--prompt", type=int, required=True, help="tokens of a prompt")
    verb.add_argument("--output", type=int, required=True, help="tokens of its answer")
    verb.add_argument("--slo-ttft-ms", type=float, required=True, help="time to the first token")
    verb.add_argument("--slo-tpot-ms", type=float, required=True, help="time per output token")
    verb.add_argument("--rate", type=float, help="requests a second (default: as many as can be)")
    verb.add_argument("--hardware", default="cloudmatrix384", help="cloudmatrix384 (default), h800 or h100")
    verb.add_argument("--npus", type=int, default=384, help="that there are (default 384)")
    verb.add_argument("--mtp-acceptance", type=float, default=0.7, help="of a draft (default 0.7)")
    verb.add_argument("--plots", metavar="DIR", help="the candidates and their front, as PNG and SVG")
    add_json(verb)


def _plan(args: argparse.Namespace) -> None:
    from cmx_jax.analysis.plan.figures import Folder, front
    from cmx_jax.analysis.plan.plan import plan, render
    from cmx_jax.analysis.predict.candidates import Load
    from cmx_jax.serving.deploy.model import config_of

    to = Folder(args.plots)
    load = Load(args.prompt, args.output, args.slo_ttft_ms, args.slo_tpot_ms)
    given = {name: getattr(args, name) for name in ("hardware", "npus", "rate", "mtp_acceptance")}
    result = plan(config_of(args.model), load, progress=progress(), **given)
    if args.plots:
        to.write("plan", front(result))
    show(result, args.json, render)
