"""`cmx simulate`: a day of traffic in virtual time."""

import argparse
from dataclasses import fields
from pathlib import Path
from typing import Any

from cmx_jax.cli.common import add_json, show
from cmx_jax.errors import CmxError

# of serving/simulate/times.py:Linear
TIMES = (
    ("--prefill-ms", 0.0, "of a prefill step, however short"),
    ("--prefill-ms-per-1k", None, "of 1,000 tokens of a prefill step's longest row"),
    ("--decode-ms", None, "of a decode step with one sequence a rank"),
    ("--decode-ms-per-sequence", 0.0, "of each further sequence on the busiest rank"),
    ("--decode-ms-per-1m", 0.0, "of 1,000,000 cached tokens on the busiest rank"),
    ("--transfer-ms-per-1k", 0.0, "of moving 1,000 tokens' rows to decode"),
    ("--fetch-ms-per-1k", 0.0, "of fetching 1,000 tokens' rows from the prefix cache"),
)
# the paper's: instances, NPUs of each, ranks that have sequences of their own
POOLS = {"prefill": (6, 16, 1), "decode": (1, 160, 320)}


def add(verbs: Any) -> None:
    """The verb and its flags."""
    verb = verbs.add_parser("simulate", help="serve traffic in virtual time: latencies, throughput, goodput")
    verb.set_defaults(run=_simulate)
    traffic = verb.add_argument_group("traffic: a trace, or requests drawn at a rate")
    traffic.add_argument("--trace", type=Path, metavar="FILE", help="JSONL in Mooncake's format")
    traffic.add_argument("--rate", type=float, help="requests a second")
    traffic.add_argument(
        "--burstiness", type=float, default=1.0, help="1: Poisson (default); below: burstier"
    )
    lengths = "tokens, or uniform:LOW,HIGH, exponential:MEAN, lognormal:MEDIAN,SIGMA"
    traffic.add_argument("--prompt", default="4096", help=f"{lengths} (default 4096)")
    traffic.add_argument("--output", default="256", help="the same (default 256)")
    traffic.add_argument("--duration", type=float, help="seconds of arrivals (default 3600)")
    traffic.add_argument("--requests", type=int, help="instead of --duration")
    traffic.add_argument("--seed", type=int, default=0)

    machine = verb.add_argument_group("instances of a supernode")
    for kind, (instances, npus, ranks) in POOLS.items():
        machine.add_argument(f"--{kind}-instances", type=int, default=instances, help=f"default {instances}")
        machine.add_argument(f"--{kind}-npus", type=int, default=npus, help=f"of each (default {npus})")
        machine.add_argument(
            f"--{kind}-ranks",
            type=int,
            default=ranks,
            help=f"that have sequences of their own (default {ranks})",
        )
        machine.add_argument(
            f"--{kind}-kv-tokens", type=int, default=1 << 18, help=f"that a rank caches (default {1 << 18})"
        )
    machine.add_argument("--max-num-seqs", type=int, default=48, help="that a decode rank runs (default 48)")
    batched = "of a prefill step's row (default 16384)"
    machine.add_argument("--max-num-batched-tokens", type=int, default=16384, help=batched)
    machine.add_argument("--block-size", type=int, default=128, help="tokens of a page (default 128)")
    machine.add_argument("--mtp-acceptance", type=float, default=0.0, help="right drafts a step (default 0)")
    cached = "that the prefix cache of a supernode holds (default 0)"
    machine.add_argument("--prefix-tokens", type=int, default=0, help=cached)
    machine.add_argument("--supernodes", type=int, default=1, help="behind one router (default 1)")
    routers = "least-loaded (default), round-robin or prefix"
    machine.add_argument("--router", default="least-loaded", help=routers)

    times = verb.add_argument_group("times, milliseconds")
    for flag, default, meaning in TIMES:
        more = {"required": True} if default is None else {"default": default}
        times.add_argument(flag, type=float, help=meaning, **more)
    verb.add_argument("--slo-ttft-ms", type=float, help="goodput counts what has its first token by then")
    verb.add_argument("--slo-tpot-ms", type=float, help="and further ones this far apart on average")
    add_json(verb)


def _simulate(args: argparse.Namespace) -> None:
    from cmx_jax.serving.simulate import Linear, render, simulate, summary

    times = Linear(**{f.name: getattr(args, f.name) for f in fields(Linear)})
    deployment = _deployment(args)
    outcome = simulate(_traffic(args), deployment, times, supernodes=args.supernodes, router=args.router)
    show(summary(outcome, args.slo_ttft_ms, args.slo_tpot_ms), args.json, render)


def _traffic(args: argparse.Namespace) -> Any:
    from cmx_jax.serving.simulate import mooncake, synthetic

    if (args.trace is None) == (args.rate is None):
        raise CmxError("expected --trace FILE or --rate R, one of them")
    if args.trace is not None:
        return mooncake(args.trace)
    duration = 3600.0 if args.duration is None and args.requests is None else args.duration
    given = {
        name: getattr(args, name) for name in ("rate", "prompt", "output", "burstiness", "seed", "requests")
    }
    return synthetic(duration=duration, **given)


def _deployment(args: argparse.Namespace) -> Any:
    from cmx_jax.mesh.supernode import CLOUDMATRIX384
    from cmx_jax.serving.ranks import Capacity
    from cmx_jax.serving.simulate import Deployment, Pool
    from cmx_jax.serving.simulate.workload import BLOCK

    width = args.block_size
    if width < 1:
        raise CmxError(f"block_size is {width}, expected at least 1")

    def pool(kind: str, sequences: int) -> Pool:
        instances, npus, ranks, tokens = (
            getattr(args, f"{kind}_{name}") for name in ("instances", "npus", "ranks", "kv_tokens")
        )
        budget = args.max_num_batched_tokens
        capacity = Capacity(
            sequences=sequences, pages=tokens // width, page_width=width, max_num_batched_tokens=budget
        )
        return Pool(instances=instances, npus=npus, ranks=ranks, capacity=capacity)

    deployment = Deployment(
        prefill=pool("prefill", 1),
        decode=pool("decode", args.max_num_seqs),
        acceptance=args.mtp_acceptance,
        prefix_blocks=args.prefix_tokens // BLOCK,
    )
    if deployment.npus > CLOUDMATRIX384.npus:
        raise CmxError(
            f"{args.prefill_instances} x {args.prefill_npus} prefill and {args.decode_instances} x "
            f"{args.decode_npus} decode NPUs are {deployment.npus}, expected at most the supernode's "
            f"{CLOUDMATRIX384.npus}: give fewer instances, or more --supernodes"
        )
    return deployment
