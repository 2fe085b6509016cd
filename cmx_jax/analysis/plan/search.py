"""Which deployments could serve a load: layouts, batches, drafts and the ratio of prefill to decode.

Instances are those of `analysis/predict/candidates.py`. What is assumed beyond their predictions: load is
steady; a prompt waits half a prefill step, runs one, and its rows travel over RDMA; a sequence attends to its
prompt and half its output on average. `analysis/plan/plan.py` drops the first.
"""

import math
from collections.abc import Callable
from typing import Any

from cmx_jax.analysis.cost.constants import machine
from cmx_jax.analysis.predict.candidates import Load, candidates, predicted
from cmx_jax.errors import CmxError
from cmx_jax.model.config import ModelConfig

STEPS = ("prefill", "decode")


def search(
    c: ModelConfig,
    load: Load,
    *,
    hardware: str = "cloudmatrix384",
    npus: int = 384,
    rate: float | None = None,
    mtp_acceptance: float = 0.7,
    progress: Callable[[str], None] = lambda _: None,
) -> dict[str, Any]:
    """Searches instances of both pools, then how many of each.

    Larger batches of an instance are predicted until one does not fit, or misses its SLO.

    Args:
      c: the model.
      load: prompts, answers, SLO.
      hardware: a name in `cmx_jax.analysis.cost.constants.MACHINES`.
      npus: that there are.
      rate: requests a second to serve; None: as many as can be.
      mtp_acceptance: how likely a draft is right.
      progress: told what is predicted.

    Returns:
      `deployments`, with one batch of each decode instance, the best first: most requests a second, or with
      a rate the fewest NPUs; `decode`: its candidates; `pareto`: those of which no other is faster for a user
      (`tpot_ms`) and for the house (`tokens_per_s` an NPU); `candidates`: how many there are; `predicted`: of
      how many; `unfit`: why others do not fit, and how many.

    Raises:
      CmxError: nothing meets the SLO, or the rate; says what would.
    """
    on = machine(hardware)
    if npus < 1 or (rate is not None and not 0 < rate < math.inf):
        raise CmxError(f"npus is {npus} and rate {rate}, expected more than 0")
    unfit: dict[str, int] = {}
    found = {
        step: list(predicted(c, on, step, load, npus, mtp_acceptance, unfit, progress)) for step in STEPS
    }
    for step, of in found.items():
        if not of:
            raise CmxError(
                f"{npus} NPUs of {hardware} hold no {step} instance: {next(iter(unfit), 'too few')}"
            )
    met = {step: _within(of, *load.slo(step)) for step, of in found.items()}
    pairs = [(p, d) for p in met["prefill"] for d in met["decode"] if p["drafts"] == min(d["drafts"], 1)]
    made = [m for p, d in pairs if (m := deployed(p, d, load, npus, rate))]
    if not made:
        most = max(
            (m["requests_per_s"] for p, d in pairs if (m := deployed(p, d, load, npus, None))), default=0
        )
        raise CmxError(_beyond(npus, hardware, rate, most))
    made.sort(key=lambda m: order(m, rate))
    return {
        "deployments": _different(made),
        "decode": found["decode"],
        "pareto": _pareto(found["decode"]),
        "candidates": sum(len(of[-1]) for step in STEPS for of in candidates(c, on, step, npus)),
        "predicted": sum(map(len, found.values())),
        "unfit": unfit,
    }


def order(deployment: dict[str, Any], rate: float | None) -> tuple[float, ...]:
    """Most requests a second first, with a rate the fewest NPUs; of equals the fastest tokens."""
    npus, served = deployment["npus"], -deployment["requests_per_s"]
    return (*((npus, served) if rate else (served, npus)), deployment["decode"]["tpot_ms"])


def _within(of: list[dict[str, Any]], name: str, most: float) -> list[dict[str, Any]]:
    met = [x for x in of if x[name] <= most]
    if not met:
        x, what = min(of, key=lambda x: x[name]), "a token" if name == "tpot_ms" else "to the first token"
        raise CmxError(
            f"nothing meets {most:g} ms {what}: the fastest takes {x[name]:.1f} ms, {x['ranks']} ranks with "
            f"{x['batch']} sequences an NPU"
        )
    return met


def _beyond(npus: int, hardware: str, rate: float | None, most: float) -> str:
    there = f"{npus} NPUs of {hardware}"
    if rate is None or not most:
        return f"{there} do not hold both a prefill and a decode instance, expected more NPUs"
    return f"{there} cannot serve {rate:g} requests/s, expected at most {most:.2f}, or more NPUs"


def deployed(
    prefill: dict[str, Any], decode: dict[str, Any], load: Load, npus: int, rate: float | None
) -> dict[str, Any] | None:
    """So many instances of each as serve the rate, or the most; None if they are more than there is.

    Args:
      prefill: an instance, as `search` has them.
      decode: another.
      load: what is asked of them.
      npus: that there are.
      rate: requests a second; None: as many as can be.
    """

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
    return counted(prefill, prefillers, decode, decoders, load)


def counted(
    prefill: dict[str, Any], prefillers: int, decode: dict[str, Any], decoders: int, load: Load
) -> dict[str, Any]:
    """So many instances of each, and what they serve under steady load."""
    rates = prefillers * prefill["requests_per_s"], decoders * decode["requests_per_s"]
    used = decoders * decode["npus"] + prefillers * prefill["npus"]
    return {
        "requests_per_s": min(rates),
        "npus": used,
        "tokens_per_s_npu": min(rates) * load.output / used,
        "prefill_instances": prefillers,
        "decode_instances": decoders,
        "prefill": prefill,
        "decode": decode,
        "why": _why(min(rates), *rates),
    }


def _why(served: float, prefill: float, decode: float) -> str:
    """What limits it, and how much the other pool has left."""
    first, other, most = (
        ("prefill", "decode", decode) if prefill <= decode else ("decode", "prefill", prefill)
    )
    return f"{first} limits it, {other} is busy {served / most:.0%} of the time"


def _different(made: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The first of those whose decode instances differ by their batch alone."""
    seen: dict[Any, dict[str, Any]] = {}
    for m in made:
        seen.setdefault(tuple(m["decode"][n] for n in ("ranks", "drafts", "microbatches")), m)
    return list(seen.values())


def _pareto(of: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """By `tpot_ms`, each with more tokens a second than all faster ones."""
    front: list[dict[str, Any]] = []
    for x in sorted(of, key=lambda x: (x["tpot_ms"], -x["tokens_per_s"])):
        if not front or x["tokens_per_s"] > front[-1]["tokens_per_s"]:
            front.append(x)
    return front
