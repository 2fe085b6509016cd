"""Which deployment serves a load within an SLO: layouts, batches, drafts and the ratio of prefill to decode.

Every candidate is predicted from its own traced step (`model/predict.py`). What is assumed beyond that: load
is steady; a prompt waits half a prefill step, runs one, and its rows travel over RDMA; a sequence attends to
its prompt and half its output on average.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from cmx_jax.errors import CmxError
from cmx_jax.mesh.cost.constants import Machine, machine
from cmx_jax.mesh.layout import Layout, expert_parallel
from cmx_jax.mesh.supernode import CLOUDMATRIX384
from cmx_jax.model.config import MLAConfig, ModelConfig
from cmx_jax.model.memory import page_bytes
from cmx_jax.model.predict import predict

RANKS = {  # of an instance: dies of whole nodes, or GPUs
    ("ascend", "decode"): (64, 128, 320),
    ("gpu", "decode"): (32, 64, 144),
    ("ascend", "prefill"): (16, 32, 64),
    ("gpu", "prefill"): (16, 32, 64),
}
BATCHES = {"decode": (8, 16, 24, 32, 48, 64, 96, 128, 160, 192), "prefill": (1, 2, 4, 8)}
RDMA = CLOUDMATRIX384.planes[1].npu_gb_s  # an H800 has as much


@dataclass(frozen=True)
class Load:
    """What is asked of a deployment: tokens of a prompt and of its answer, and how soon they must come."""

    prompt: int
    output: int
    slo_ttft_ms: float
    slo_tpot_ms: float

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if not 0 < value < math.inf:
                raise CmxError(f"{name} is {value:g}, expected more than 0")
        if self.output < 2:
            raise CmxError(f"output is {self.output}, expected at least 2 tokens: the first is prefill's")


def plan(
    c: ModelConfig,
    load: Load,
    *,
    hardware: str = "cloudmatrix384",
    npus: int = 384,
    rate: float | None = None,
    mtp_acceptance: float = 0.7,
    best: int = 5,
    progress: Callable[[str], None] = lambda _: None,
) -> dict[str, Any]:
    """Searches instances of both pools, then how many of each.

    Args:
      c: the model.
      load: prompts, answers, SLO.
      hardware: a name in `cmx_jax.mesh.cost.constants.MACHINES`.
      npus: that there are.
      rate: requests a second to serve; None: as many as can be.
      mtp_acceptance: how likely a draft is right.
      best: deployments to return.
      progress: told what is predicted.

    Returns:
      `deployments`, the best first: most requests a second, or with a rate the fewest NPUs; `pareto`: decode
      candidates of which no other is faster for a user (`tpot_ms`) and for the house (`tokens_per_s` an NPU);
      `candidates`: how many were predicted; `unfit`: why others were not, and how many.

    Raises:
      CmxError: nothing meets the SLO, or the rate; says what would.
    """
    on = machine(hardware)
    if npus < 1 or (rate is not None and not 0 < rate < math.inf):
        raise CmxError(f"npus is {npus} and rate {rate}, expected more than 0")
    unfit: dict[str, int] = {}
    found = {
        step: list(_predicted(c, on, step, load, npus, mtp_acceptance, unfit, progress))
        for step in ("decode", "prefill")
    }
    for step, of in found.items():
        if not of:
            raise CmxError(
                f"{npus} NPUs of {hardware} hold no {step} instance: {next(iter(unfit), 'too few')}"
            )
    met = {
        "decode": _within(found["decode"], "tpot_ms", load.slo_tpot_ms, "a token"),
        "prefill": _within(found["prefill"], "ttft_ms", load.slo_ttft_ms, "to the first token"),
    }
    made = [m for p in met["prefill"] for d in met["decode"] if (m := _deployed(p, d, load, npus, rate))]
    if not made:
        raise CmxError(
            f"{npus} NPUs of {hardware} cannot serve {rate:g} requests/s, expected more NPUs or less"
        )
    made.sort(key=lambda m: (m["npus"], -m["requests_per_s"]) if rate else (-m["requests_per_s"], m["npus"]))
    return {
        "load": vars(load) | {"rate": rate},
        "hardware": hardware,
        "npus": npus,
        "deployments": _different(made)[:best],
        "pareto": _pareto(found["decode"]),
        "candidates": sum(map(len, found.values())),
        "unfit": unfit,
    }


def _layouts(c: ModelConfig, on: Machine, step: str) -> Iterator[Layout]:
    """Experts over all ranks of an instance, in INT8, an even number of slots; prompts are shared where heads
    can be (section 4.3.1)."""
    for ranks in RANKS[on.kind, step]:
        given: dict[str, Any] = {"wire": "int8", "redundant_slots": -c.n_routed_experts % ranks}
        if step == "decode":
            given["mailbox_rows"] = 0
        if step == "prefill" or on.kind == "gpu":
            given["exchange"] = "hierarchical"
        shares = isinstance(c.attention, MLAConfig) and c.num_attention_heads % ranks == 0
        given["share_sequences"] = step == "prefill" and on.kind == "ascend" and shares
        yield from (expert_parallel(ranks, c.n_routed_experts, microbatches=n, **given) for n in (1, 2))


def _predicted(
    c: ModelConfig,
    on: Machine,
    step: str,
    load: Load,
    npus: int,
    acceptance: float,
    unfit: dict[str, int],
    progress: Callable[[str], None],
) -> Iterator[dict[str, Any]]:
    """Instances of one pool that fit, larger batches until they do not."""
    mtp = (0, 1) if c.num_nextn_predict_layers else (0,)
    for layout in _layouts(c, on, step):
        if layout.ranks > npus * on.ranks_per_npu:
            continue
        shared = layout.sequence_ranks
        context = -(-load.prompt // shared) * shared if step == "prefill" else load.prompt + load.output // 2
        for drafts in mtp if step == "decode" else mtp[-1:]:
            for batch in BATCHES[step]:
                progress(f"{step}: {layout.ranks} ranks, {batch} sequences an NPU")
                sizes = {"batch": batch, "context": context, "drafts": drafts}
                try:
                    one = predict(c, on, layout, step, mtp_acceptance=acceptance, **sizes)  # type: ignore[arg-type]
                except CmxError as error:
                    reason = str(error)
                    unfit[reason] = unfit.get(reason, 0) + 1
                    if "GB of a rank" in reason:
                        break
                    continue
                yield _instance(c, on, layout, one, load)


def _instance(c: ModelConfig, on: Machine, layout: Layout, one: dict[str, Any], load: Load) -> dict[str, Any]:
    npus = layout.ranks // on.ranks_per_npu
    names = ("step", "batch", "drafts", "microbatches", "step_ms", "tokens_per_s", "tpot_ms", "bound")
    found = {"ranks": layout.ranks, "npus": npus} | {name: one[name] for name in names}
    if one["step"] == "prefill":
        rows = load.prompt * page_bytes(c, 1, "auto", c.num_nextn_predict_layers > 0)
        transfer = rows / (RDMA / on.ranks_per_npu * 1e6)
        found |= {"transfer_ms": transfer, "ttft_ms": 1.5 * one["step_ms"] + transfer}
    each = load.prompt if one["step"] == "prefill" else load.output - 1
    return found | {"requests_per_s": one["tokens_per_s"] * npus / each}


def _within(of: list[dict[str, Any]], name: str, most: float, what: str) -> list[dict[str, Any]]:
    met = [x for x in of if x[name] <= most]
    if not met:
        x = min(of, key=lambda x: x[name])
        raise CmxError(
            f"nothing meets {most:g} ms {what}: the fastest takes {x[name]:.1f} ms, {x['ranks']} ranks with "
            f"{x['batch']} sequences an NPU"
        )
    return met


def _deployed(
    prefill: dict[str, Any], decode: dict[str, Any], load: Load, npus: int, rate: float | None
) -> dict[str, Any] | None:
    """So many instances of each as serve the rate, or the most; None if they are more than there is."""

    def of(count: int, wanted: float) -> tuple[float, int, int]:
        takes = max(math.ceil(wanted / prefill["requests_per_s"] - 1e-9), 1)
        most = (npus - count * decode["npus"]) // prefill["npus"]
        takes = takes if rate else min(takes, most)
        served = min(count * decode["requests_per_s"], takes * prefill["requests_per_s"])
        return (served, count, takes) if 1 <= takes <= most else (0.0, count, takes)

    if rate:
        counts = [math.ceil(rate / decode["requests_per_s"] - 1e-9)]
    else:
        counts = list(range(1, npus // decode["npus"] + 1))
    tried = [of(count, rate or count * decode["requests_per_s"]) for count in counts]
    served, decoders, prefillers = max(tried, default=(0.0, 0, 0))
    if not served:
        return None
    used = decoders * decode["npus"] + prefillers * prefill["npus"]
    return {
        "requests_per_s": served,
        "npus": used,
        "tokens_per_s_npu": served * load.output / used,
        "prefill_instances": prefillers,
        "decode_instances": decoders,
        "prefill": prefill,
        "decode": decode,
        "why": _why(served, prefillers * prefill["requests_per_s"], decoders * decode["requests_per_s"]),
    }


def _why(served: float, prefill: float, decode: float) -> str:
    """What limits it, and how much the other pool has left."""
    first, other, most = (
        ("prefill", "decode", decode) if prefill <= decode else ("decode", "prefill", prefill)
    )
    return f"{first} limits it, {other} is busy {served / most:.0%} of the time"


def _different(made: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The first of those with the same decode instance."""
    seen: dict[Any, dict[str, Any]] = {}
    for m in made:
        seen.setdefault(tuple(m["decode"][n] for n in ("ranks", "batch", "drafts", "microbatches")), m)
    return list(seen.values())


def _pareto(of: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """By `tpot_ms`, each with more tokens a second than all faster ones."""
    front: list[dict[str, Any]] = []
    for x in sorted(of, key=lambda x: (x["tpot_ms"], -x["tokens_per_s"])):
        if not front or x["tokens_per_s"] > front[-1]["tokens_per_s"]:
            front.append(x)
    return front


def render(found: dict[str, Any]) -> str:
    """The deployments, then the front."""
    lines = []
    for m in found["deployments"]:
        p, d = m["prefill"], m["decode"]
        pools = (
            f"{m['prefill_instances']} prefill x {p['npus']}, {m['decode_instances']} decode x {d['npus']}"
        )
        lines += [
            f"{m['requests_per_s']:8.2f} requests/s on {m['npus']} NPUs ({pools}), "
            f"{m['tokens_per_s_npu']:,.0f} tokens/s each",
            f"         prefill EP{p['ranks']}, batch {p['batch']}, microbatches {p['microbatches']}: "
            f"{p['ttft_ms']:.0f} ms to the first token",
            f"         decode EP{d['ranks']}, batch {d['batch']}, microbatches {d['microbatches']}, drafts "
            f"{d['drafts']}: {d['tpot_ms']:.1f} ms a token, bound by {d['bound']}; {m['why']}",
        ]
    lines += ["", "decode: ms a token against tokens/s of an NPU, where no other has more of both"]
    lines += [
        f"{x['tpot_ms']:8.1f} {x['tokens_per_s']:8,.0f}   EP{x['ranks']}, batch {x['batch']}, microbatches "
        f"{x['microbatches']}, drafts {x['drafts']}"
        for x in found["pareto"]
    ]
    lines.append(f"{found['candidates']} candidates, {sum(found['unfit'].values())} do not fit")
    return "\n".join(lines)
