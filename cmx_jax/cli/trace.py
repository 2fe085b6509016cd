"""`cmx trace`."""

import argparse
from dataclasses import asdict
from typing import Any

from cmx_jax.cli.common import add_json, show


def add(verbs: Any) -> None:
    """The verb and its flags."""
    verb = verbs.add_parser("trace", help="what a step's collectives move, at full size, without weights")
    verb.set_defaults(run=_trace)
    verb.add_argument("model", metavar="MODEL", help="a directory, tiny, or a preset such as deepseek-r1")
    layouts = "ep320 and ep32 (the paper's), or epN (default ep320)"
    verb.add_argument("--layout", default="ep320", help=layouts)
    verb.add_argument("--step", choices=("decode", "prefill"), help="default: what the layout is for")
    verb.add_argument("--batch", type=int, help="sequences of an NPU (default: the paper's)")
    verb.add_argument("--context", type=int, default=4096, help="tokens of a sequence (default 4096)")
    verb.add_argument("--num-speculative-tokens", type=int, default=0, help="MTP drafts (default 0)")
    add_json(verb)


def _trace(args: argparse.Namespace) -> None:
    from cmx_jax.mesh.trace.table import render
    from cmx_jax.model.trace import ready, trace_model
    from cmx_jax.serving.model import config_of

    c, found = config_of(args.model), ready(args.layout)
    layout, step = found.make(c.n_routed_experts), args.step or found.step
    batch = found.batch if args.batch is None else args.batch
    result = trace_model(
        c,
        layout,
        step,
        batch=batch,
        context=args.context,
        drafts=args.num_speculative_tokens,
        ranks_per_npu=found.ranks_per_npu,
    )
    given = {"model": args.model, "layout": args.layout, "about": found.about, "step": step, "batch": batch}
    document = given | {"context": args.context, "ranks": layout.ranks, "source": "jaxpr", **asdict(result)}
    show(document, args.json, lambda _: render(result))
