"""`cmx simulate`: serving traffic in virtual time."""

import argparse
from pathlib import Path
from typing import Any

from cmx_jax.cli.common import add_json, show
from cmx_jax.errors import CmxError

# fields of analysis/simulate/times.py:Linear; a flag without default is required unless --predict is given
TIMES = (
    ("--prefill-ms", 0.0, "fixed milliseconds per prefill step (default 0)"),
    ("--prefill-ms-per-1k", None, "milliseconds per 1,000 tokens of a prefill step's longest row"),
    ("--decode-ms", None, "milliseconds of a decode step with one sequence per rank"),
    (
        "--decode-ms-per-sequence",
        0.0,
        "milliseconds per further sequence on the busiest rank (default 0)",
    ),
    ("--decode-ms-per-1m", 0.0, "milliseconds per 1,000,000 cached tokens on the busiest rank (default 0)"),
    ("--transfer-ms-per-1k", 0.0, "milliseconds to move 1,000 tokens' KV rows to decode (default 0)"),
    (
        "--fetch-ms-per-1k",
        0.0,
        "milliseconds to fetch 1,000 tokens from the prefix cache (default 0)",
    ),
)
# sizes of the paper: instances, NPUs per instance, ranks with sequences of their own, layout
POOLS = {"prefill": (6, 16, 1, "ep32"), "decode": (1, 160, 320, "ep320")}
# flags that need --predict
PREDICT: tuple[tuple[str, Any, str], ...] = (
    ("--hardware", "cloudmatrix384", "machine: cloudmatrix384, h800 or h100"),
    *(
        (f"--{kind}-layout", layout, f"layout of a {kind} instance, by a name that cmx trace takes")
        for kind, (*_, layout) in POOLS.items()
    ),
    ("--microbatches", 2, "microbatches per step"),
    ("--num-speculative-tokens", 1, "MTP drafts per decode step"),
)


def add(verbs: Any) -> None:
    """Adds the verb and its flags."""
    verb = verbs.add_parser("simulate", help="serve traffic in virtual time: latencies, throughput, goodput")
    verb.set_defaults(run=_simulate)
    traffic = verb.add_argument_group("traffic: a trace, or requests drawn at a rate")
    traffic.add_argument("--trace", type=Path, metavar="FILE", help="trace, JSONL in Mooncake's format")
    traffic.add_argument("--rate", type=float, help="requests per second, instead of --trace")
    burstiness = "shape of the gamma-distributed intervals; 1: Poisson (default), lower: burstier"
    traffic.add_argument("--burstiness", type=float, default=1.0, help=burstiness)
    lengths = "tokens, or uniform:LOW,HIGH, exponential:MEAN, lognormal:MEDIAN,SIGMA"
    traffic.add_argument("--prompt", default="4096", help=f"prompt lengths: {lengths} (default 4096)")
    traffic.add_argument("--output", default="256", help=f"output lengths: {lengths} (default 256)")
    traffic.add_argument("--duration", type=float, help="seconds of arrivals (default 3600)")
    traffic.add_argument("--requests", type=int, help="number of requests, instead of --duration")
    traffic.add_argument("--seed", type=int, default=0, help="seed of the random traffic (default 0)")

    machine = verb.add_argument_group("instances of a supernode")
    for kind, (instances, npus, ranks, _) in POOLS.items():
        number = f"number of {kind} instances (default {instances})"
        machine.add_argument(f"--{kind}-instances", type=int, default=instances, help=number)
        machine.add_argument(f"--{kind}-npus", type=int, help=f"NPUs per {kind} instance (default {npus})")
        ranks_help = f"ranks per {kind} instance that have sequences of their own (default {ranks})"
        machine.add_argument(f"--{kind}-ranks", type=int, help=ranks_help)
        cache = f"tokens in a {kind} rank's KV cache (default {1 << 18}; with --predict as many as fit)"
        machine.add_argument(f"--{kind}-kv-tokens", type=int, help=cache)
    sequences = "sequences that a decode rank runs at once (default 48)"
    machine.add_argument("--max-num-seqs", type=int, default=48, help=sequences)
    batched = "tokens of a prefill step's row (default 16384; with --predict for each NPU that shares it)"
    machine.add_argument("--max-num-batched-tokens", type=int, help=batched)
    machine.add_argument("--block-size", type=int, help="tokens per KV page (default 128)")
    acceptance = "mean accepted drafts per step (default 0); with --predict the probability that a draft is "
    machine.add_argument("--mtp-acceptance", type=float, help=f"{acceptance}accepted (default 0.7)")
    prefix = "tokens in a supernode's prefix cache (default 0)"
    machine.add_argument("--prefix-tokens", type=int, default=0, help=prefix)
    supernodes = "number of supernodes that share one router (default 1)"
    machine.add_argument("--supernodes", type=int, default=1, help=supernodes)
    routers = "choice of a request's supernode: least-loaded (default), round-robin or prefix"
    machine.add_argument("--router", default="least-loaded", help=routers)

    times = verb.add_argument_group("times in milliseconds, or predicted for a model's layouts")
    for flag, _, meaning in TIMES:
        times.add_argument(flag, type=float, help=meaning)
    model = "predict all times for this model: a directory, tiny, or a preset such as deepseek-r1"
    times.add_argument("--predict", metavar="MODEL", help=model)
    for flag, default, meaning in PREDICT:
        value_type = int if isinstance(default, int) else str
        times.add_argument(flag, type=value_type, help=f"{meaning} (default {default}; needs --predict)")
    ttft = "goodput: largest time to first token of a good request, in milliseconds"
    verb.add_argument("--slo-ttft-ms", type=float, help=ttft)
    tpot = "goodput: largest mean time per further token of a good request, in milliseconds"
    verb.add_argument("--slo-tpot-ms", type=float, help=tpot)
    add_json(verb)


def _simulate(args: argparse.Namespace) -> None:
    from cmx_jax.analysis.simulate import render, simulate, summary

    traffic = _traffic(args)
    times, deployment = _predicted(args) if args.predict else _linear(args)
    _check_npus(args, deployment)
    outcome = simulate(traffic, deployment, times, supernodes=args.supernodes, router=args.router)
    result = summary(outcome, args.slo_ttft_ms, args.slo_tpot_ms)
    show(result.as_dict(), args.json, lambda _: render(result))


def _traffic(args: argparse.Namespace) -> Any:
    from cmx_jax.analysis.simulate import mooncake, synthetic

    if (args.trace is None) == (args.rate is None):
        raise CmxError("expected --trace FILE or --rate R, one of them")
    if args.trace is not None:
        return mooncake(args.trace)
    duration = 3600.0 if args.duration is None and args.requests is None else args.duration
    names = ("rate", "prompt", "output", "burstiness", "seed", "requests")
    return synthetic(duration=duration, **{name: getattr(args, name) for name in names})


def _destination(flag: str) -> str:
    return flag.removeprefix("--").replace("-", "_")


def _linear(args: argparse.Namespace) -> tuple[Any, Any]:
    """Step times and deployment that the flags give."""
    from cmx_jax.analysis.simulate import InstancePool, Linear, SimulatedDeployment
    from cmx_jax.serving.scheduling.ranks import Capacity

    for flag, *_ in PREDICT:
        if getattr(args, _destination(flag)) is not None:
            raise CmxError(f"{flag} is given without --predict MODEL: give that, or leave it out")
    ms: dict[str, float] = {}
    for flag, default, _ in TIMES:
        value = getattr(args, _destination(flag))
        if value is None and default is None:
            raise CmxError(f"{flag} is not given, expected it, or --predict MODEL")
        ms[_destination(flag)] = (default or 0.0) if value is None else value
    times, width = Linear(**ms), 128 if args.block_size is None else args.block_size
    if width < 1:
        raise CmxError(f"block_size is {width}, expected at least 1")
    budget = 16384 if args.max_num_batched_tokens is None else args.max_num_batched_tokens

    def pool(kind: str, sequences: int) -> InstancePool:
        instances, npus, ranks, tokens = (
            getattr(args, f"{kind}_{name}") for name in ("instances", "npus", "ranks", "kv_tokens")
        )
        capacity = Capacity(
            sequences=sequences,
            pages=(1 << 18 if tokens is None else tokens) // width,
            page_width=width,
            max_num_batched_tokens=budget,
        )
        _, default_npus, default_ranks, _ = POOLS[kind]
        return InstancePool(
            instances=instances,
            npus=default_npus if npus is None else npus,
            ranks=default_ranks if ranks is None else ranks,
            capacity=capacity,
        )

    deployment = SimulatedDeployment(
        prefill=pool("prefill", 1),
        decode=pool("decode", args.max_num_seqs),
        acceptance=args.mtp_acceptance or 0.0,
        prefix_blocks=_blocks(args),
    )
    return times, deployment


def _predicted(args: argparse.Namespace) -> tuple[Any, Any]:
    """Step times and deployment of a model's layouts on a machine."""
    from dataclasses import replace

    from cmx_jax.analysis.cost.constants import machine
    from cmx_jax.analysis.simulate import Predicted, SimulatedDeployment
    from cmx_jax.mesh.layout import Layout
    from cmx_jax.mesh.named_layouts import ready
    from cmx_jax.serving.deploy.model import config_of

    sizes = [f"--{kind}-{size}" for kind in POOLS for size in ("npus", "ranks")]
    for flag in (*(flag for flag, *_ in TIMES), *sizes, "--block-size"):
        if getattr(args, _destination(flag)) is not None:
            raise CmxError(f"{flag} is given, but --predict says what it is: leave one of them out")
    options = {_destination(flag): default for flag, default, _ in PREDICT}
    options |= {name: value for name in options if (value := getattr(args, name)) is not None}
    c = config_of(args.predict)

    def layout(kind: str) -> Layout:
        name, hardware = options[f"{kind}_layout"], machine(options["hardware"])
        named, expected = ready(name), hardware.ranks_per_npu
        if named.ranks_per_npu != expected:
            raise CmxError(
                f"layout {name} has {named.ranks_per_npu} rank(s) an NPU, expected {expected} on "
                f"{hardware.name}, as of {'ep320' if expected > 1 else 'h800-ep144'}"
            )
        return replace(named.make(c.n_routed_experts), microbatches=options["microbatches"])

    drafts = options["num_speculative_tokens"]
    times = Predicted(c, options["hardware"], layout("prefill"), layout("decode"), drafts=drafts)
    budget = args.max_num_batched_tokens
    if budget is None:
        budget = 16384 * max(times.layouts["prefill"].sequence_ranks // times.machine.ranks_per_npu, 1)
    deployment = SimulatedDeployment(
        prefill=times.pool("prefill", args.prefill_instances, budget=budget, tokens=args.prefill_kv_tokens),
        decode=times.pool(
            "decode", args.decode_instances, sequences=args.max_num_seqs, tokens=args.decode_kv_tokens
        ),
        acceptance=times.acceptance(0.7 if args.mtp_acceptance is None else args.mtp_acceptance),
        prefix_blocks=_blocks(args),
    )
    return times, deployment


def _blocks(args: argparse.Namespace) -> int:
    from cmx_jax.analysis.simulate.workload import BLOCK

    return int(args.prefix_tokens // BLOCK)


def _check_npus(args: argparse.Namespace, deployment: Any) -> None:
    from cmx_jax.mesh.supernode import CLOUDMATRIX384

    p, d = deployment.prefill, deployment.decode
    if args.hardware in (None, "cloudmatrix384") and deployment.npus > CLOUDMATRIX384.npus:
        raise CmxError(
            f"{p.instances} x {p.npus} prefill and {d.instances} x {d.npus} decode NPUs are "
            f"{deployment.npus}, expected at most the supernode's {CLOUDMATRIX384.npus}: "
            "give fewer instances, or more --supernodes"
        )
