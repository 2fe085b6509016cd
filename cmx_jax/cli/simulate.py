"""`cmx simulate`: serving of a day's traffic, simulated in virtual time."""

import argparse
from pathlib import Path
from typing import Any

from cmx_jax.cli.common import add_json, show
from cmx_jax.errors import CmxError

# fields of analysis/simulate/times.py:Linear; those without a default are required unless --predict is given
TIMES = (
    ("--prefill-ms", 0.0, "time of a prefill step, however short, in ms"),
    ("--prefill-ms-per-1k", None, "time per 1,000 tokens of a prefill step's longest row, in ms"),
    ("--decode-ms", None, "time of a decode step with one sequence per rank, in ms"),
    ("--decode-ms-per-sequence", 0.0, "time per additional sequence on the busiest rank, in ms"),
    ("--decode-ms-per-1m", 0.0, "time per 1,000,000 cached tokens on the busiest rank, in ms"),
    ("--transfer-ms-per-1k", 0.0, "time to move 1,000 tokens' rows to decode, in ms"),
    ("--fetch-ms-per-1k", 0.0, "time to fetch 1,000 tokens' rows from the prefix cache, in ms"),
)
# the paper's pools: instances, NPUs per instance, data-parallel ranks per instance, layout
POOLS = {"prefill": (6, 16, 1, "ep32"), "decode": (1, 160, 320, "ep320")}
# flags that need --predict: name, default, help
PREDICT: tuple[tuple[str, Any, str], ...] = (
    ("--hardware", "cloudmatrix384", "machine: cloudmatrix384, h800 or h100"),
    *(
        (f"--{kind}-layout", layout, f"layout of {kind} instances, named as for cmx trace")
        for kind, (*_, layout) in POOLS.items()
    ),
    ("--microbatches", 2, "microbatches per step"),
    ("--num-speculative-tokens", 1, "MTP drafts per decode step"),
)


def add(verbs: Any) -> None:
    """Adds the verb and its flags."""
    verb = verbs.add_parser(
        "simulate", help="simulate serving in virtual time: latencies, throughput, goodput"
    )
    verb.set_defaults(run=_simulate)
    traffic = verb.add_argument_group("traffic: a trace, or requests drawn at a rate")
    traffic.add_argument(
        "--trace", type=Path, metavar="FILE", help="trace of requests, JSONL in Mooncake's format"
    )
    traffic.add_argument("--rate", type=float, help="requests per second, drawn at random instead of --trace")
    traffic.add_argument(
        "--burstiness",
        type=float,
        default=1.0,
        help="shape of the arrivals: 1 is Poisson (default), less is burstier",
    )
    lengths = "a number, or uniform:LOW,HIGH, exponential:MEAN, lognormal:MEDIAN,SIGMA"
    traffic.add_argument("--prompt", default="4096", help=f"tokens per prompt: {lengths} (default 4096)")
    traffic.add_argument("--output", default="256", help=f"tokens per answer: {lengths} (default 256)")
    traffic.add_argument("--duration", type=float, help="seconds of arrivals (default 3600)")
    traffic.add_argument("--requests", type=int, help="number of requests, instead of --duration")
    traffic.add_argument("--seed", type=int, default=0, help="seed of arrivals and lengths (default 0)")

    machine = verb.add_argument_group("instances of a supernode")
    for kind, (instances, npus, ranks, _) in POOLS.items():
        about = f"number of {kind} instances (default {instances})"
        machine.add_argument(f"--{kind}-instances", type=int, default=instances, help=about)
        about = f"NPUs per {kind} instance (default {npus})"
        machine.add_argument(f"--{kind}-npus", type=int, help=about)
        about = f"ranks per {kind} instance that have sequences of their own (default {ranks})"
        machine.add_argument(f"--{kind}-ranks", type=int, help=about)
        cached = f"tokens in the KV cache of a {kind} rank (default {1 << 18}; with --predict all that fit)"
        machine.add_argument(f"--{kind}-kv-tokens", type=int, help=cached)
    machine.add_argument(
        "--max-num-seqs", type=int, default=48, help="sequences per decode rank (default 48)"
    )
    batched = "tokens per row of a prefill step (default 16384; with --predict per NPU that shares the row)"
    machine.add_argument("--max-num-batched-tokens", type=int, help=batched)
    machine.add_argument("--block-size", type=int, help="tokens per page of the KV cache (default 128)")
    acceptance = "accepted drafts per step (default 0); with --predict the probability of one (default 0.7)"
    machine.add_argument("--mtp-acceptance", type=float, help=acceptance)
    cached = "tokens in the prefix cache of a supernode (default 0)"
    machine.add_argument("--prefix-tokens", type=int, default=0, help=cached)
    machine.add_argument(
        "--supernodes", type=int, default=1, help="number of supernodes that share one router (default 1)"
    )
    routers = "choice of the supernode for a request: least-loaded (default), round-robin or prefix"
    machine.add_argument("--router", default="least-loaded", help=routers)

    times = verb.add_argument_group(
        "times, given in milliseconds or predicted for a model's layouts on a machine"
    )
    for flag, _, meaning in TIMES:
        times.add_argument(flag, type=float, help=meaning)
    model = "model whose times are predicted: checkpoint directory, tiny, or a preset such as deepseek-r1"
    times.add_argument("--predict", metavar="MODEL", help=model)
    for flag, default, meaning in PREDICT:
        times.add_argument(flag, type=type(default), help=f"{meaning}, with --predict (default {default})")
    verb.add_argument(
        "--slo-ttft-ms", type=float, help="limit in ms of the time to the first token, for goodput"
    )
    verb.add_argument(
        "--slo-tpot-ms", type=float, help="limit in ms of the mean time per further output token, for goodput"
    )
    add_json(verb)


def _simulate(args: argparse.Namespace) -> None:
    from cmx_jax.analysis.simulate import render, simulate, summary

    traffic = _traffic(args)
    times, deployment = _predicted(args) if args.predict else _from_flags(args)
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
    options = {
        name: getattr(args, name) for name in ("rate", "prompt", "output", "burstiness", "seed", "requests")
    }
    return synthetic(duration=duration, **options)


def _destination(flag: str) -> str:
    return flag.removeprefix("--").replace("-", "_")


def _from_flags(args: argparse.Namespace) -> tuple[Any, Any]:
    """Returns the times and sizes that the flags give."""
    from cmx_jax.analysis.simulate import InstancePool, Linear, SimulatedDeployment
    from cmx_jax.serving.scheduling.allocator import Capacity

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
        defaults = POOLS[kind]
        sizes = defaults[1] if npus is None else npus, defaults[2] if ranks is None else ranks
        return InstancePool(instances=instances, npus=sizes[0], ranks=sizes[1], capacity=capacity)

    deployment = SimulatedDeployment(
        prefill=pool("prefill", 1),
        decode=pool("decode", args.max_num_seqs),
        acceptance=args.mtp_acceptance or 0.0,
        prefix_blocks=_blocks(args),
    )
    return times, deployment


def _predicted(args: argparse.Namespace) -> tuple[Any, Any]:
    """Returns the predicted times and sizes of a model's layouts on a machine."""
    from dataclasses import replace

    from cmx_jax.analysis.cost.constants import machine
    from cmx_jax.analysis.simulate import Predicted, SimulatedDeployment
    from cmx_jax.mesh.layout import Layout
    from cmx_jax.mesh.named_layouts import named_layout
    from cmx_jax.serving.deploy.model import config_of

    excluded = [flag for flag, *_ in TIMES] + [
        f"--{kind}-{name}" for kind in POOLS for name in ("npus", "ranks")
    ]
    for flag in (*excluded, "--block-size"):
        if getattr(args, _destination(flag)) is not None:
            raise CmxError(f"{flag} is given, but --predict determines it: leave one of them out")
    options = {_destination(flag): default for flag, default, _ in PREDICT}
    options |= {name: value for name in options if (value := getattr(args, name)) is not None}
    c = config_of(args.predict)

    def layout(kind: str) -> Layout:
        named, hardware = named_layout(options[f"{kind}_layout"]), machine(options["hardware"])
        expected = hardware.ranks_per_npu
        if named.ranks_per_npu != expected:
            raise CmxError(
                f"layout {options[f'{kind}_layout']} has {named.ranks_per_npu} rank(s) an NPU, expected "
                f"{expected} on {hardware.name}, as of {'ep320' if expected > 1 else 'h800-ep144'}"
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
