"""Which deployment serves a load within an SLO, where requests come as they come.

`analysis/plan/search.py` finds deployments by steady load. The best of them are then given Poisson arrivals
by the simulator, with step times predicted at the load's mean context. Requests are looked at that arrive
once the decode batch has filled. A deployment is kept where `ATTAINMENT` of them have their first token and
the others in time:

* *with a rate*: one that misses gets an instance more, of the pool whose part of the SLO is missed more
  often, until it serves the rate. One for which there are no NPUs is dropped, and the next takes its place.
* *without*: its rate is the largest part of the steady one, in steps of 1 / `STEPS`, that it serves. One that
  does not serve half of it is dropped.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np

from cmx_jax.analysis.cost.constants import machine
from cmx_jax.analysis.plan.search import counted, order, search
from cmx_jax.analysis.predict.candidates import Load, instance_layout
from cmx_jax.analysis.simulate.deployment import SimulatedDeployment
from cmx_jax.analysis.simulate.predicted import Predicted
from cmx_jax.analysis.simulate.report import summary
from cmx_jax.analysis.simulate.supernodes import simulate
from cmx_jax.analysis.simulate.workload import synthetic
from cmx_jax.analysis.trace.steps import PAGE_WIDTH
from cmx_jax.errors import CmxError
from cmx_jax.model.config import ModelConfig
from cmx_jax.serving.scheduling.pages import pages_for

ATTAINMENT = 0.9
STEPS = 32
FILL = 2  # times the longest that a request may take: before this the decode batch fills
MEASURED = 2000  # requests, at least


def plan(
    c: ModelConfig,
    load: Load,
    *,
    hardware: str = "cloudmatrix384",
    npus: int = 384,
    rate: float | None = None,
    mtp_acceptance: float = 0.7,
    best: int = 3,
    progress: Callable[[str], None] = lambda _: None,
) -> dict[str, Any]:
    """Deployments that serve a load.

    Args:
      c, load, hardware, npus, rate, mtp_acceptance, progress: as of `cmx_jax.analysis.plan.search.search`.
      best: deployments to return.

    Returns:
      What `search` found, but of its `deployments` the best that keep the SLO, each with `simulated`: the
      `rate`, how many `requests` were looked at, their `median_ttft_ms`, `p99_ttft_ms`, `median_tpot_ms`,
      `p99_tpot_ms`, `slo_attainment`, and the parts that missed each (`ttft_missed`, `tpot_missed`); and
      `load`, `hardware`, `npus`.

    Raises:
      CmxError: nothing meets the SLO, or the rate; says what would.
    """
    given: dict[str, Any] = {"hardware": hardware, "mtp_acceptance": mtp_acceptance}
    found = search(c, load, npus=npus, rate=rate, progress=progress, **given)
    tried = found.pop("deployments")[: 2 * best]
    kept = []
    for n, deployment in enumerate(tried, 1):
        progress(f"simulating deployment {n} of at most {len(tried)}")
        trial = Trial(c, load, deployment, **given)
        served = trial.most() if rate is None else trial.at_least(rate, npus)
        kept += [served] if served else []
        if len(kept) == best:
            break
    if not kept:
        raise CmxError(_missed(tried[0], load, rate, npus))
    kept.sort(key=lambda m: order(m, rate) if rate else (-m["simulated"]["rate"], m["npus"]))
    about = {"load": vars(load) | {"rate": rate}, "hardware": hardware, "npus": npus}
    return {**about, "deployments": kept, **found}


class Trial:
    """A deployment of `search` that serves arrivals in virtual time; other arguments as of `plan`."""

    def __init__(
        self, c: ModelConfig, load: Load, deployment: dict[str, Any], hardware: str, mtp_acceptance: float
    ):
        self.load, self.deployment, on = load, deployment, machine(hardware)
        layouts = [
            instance_layout(c, on, step, deployment[step]["ranks"], deployment[step]["microbatches"])
            for step in ("prefill", "decode")
        ]
        drafts, prompts = deployment["decode"]["drafts"], deployment["prefill"]["batch"]
        self.times = Predicted(c, hardware, *layouts, drafts=drafts, context=load.context)
        self.acceptance = self.times.acceptance(mtp_acceptance)
        prompts = prompts * layouts[0].sequence_ranks // on.ranks_per_npu
        budget = prompts * pages_for(load.prompt, PAGE_WIDTH) * PAGE_WIDTH
        sequences = deployment["decode"]["batch"] // on.ranks_per_npu
        self.pools = {
            "prefill": self.times.pool("prefill", 1, budget=budget),
            "decode": self.times.pool("decode", 1, sequences=sequences),
        }

    def most(self) -> dict[str, Any] | None:
        """The deployment at the largest rate that it serves; None if that is not half the steady one."""
        found: dict[int, dict[str, Any]] = {}
        low, high = STEPS // 2 - 1, STEPS
        middle = high  # most serve what they do under steady load
        while low < high:
            simulated = self.serve(self.deployment, self.deployment["requests_per_s"] * middle / STEPS)
            if simulated["slo_attainment"] >= ATTAINMENT:
                low, found[middle] = middle, simulated
            else:
                high = middle - 1
            middle = (low + high + 1) // 2
        return self.deployment | {"simulated": found[low]} if found else None

    def at_least(self, rate: float, npus: int) -> dict[str, Any] | None:
        """The deployment, with as many more instances as serve the rate; None if there are not the NPUs."""
        d = self.deployment
        while d["npus"] <= npus:
            simulated = self.serve(d, rate)
            if simulated["slo_attainment"] >= ATTAINMENT:
                return d | {"simulated": simulated}
            counts = {step: d[f"{step}_instances"] for step in self.pools}
            slower = "decode" if simulated["tpot_missed"] > simulated["ttft_missed"] else "prefill"
            counts[slower] += 1
            d = counted(d["prefill"], counts["prefill"], d["decode"], counts["decode"], self.load)
        return None

    def serve(self, d: dict[str, Any], rate: float) -> dict[str, Any]:
        """What requests of a rate meet, once the batch is full."""
        load = self.load
        takes = (load.slo_ttft_ms + load.slo_tpot_ms * (load.output - 1)) / 1e3
        fills = FILL * takes
        ends = fills + max(takes, MEASURED / rate)
        pools = {step: replace(pool, instances=d[f"{step}_instances"]) for step, pool in self.pools.items()}
        arrivals = synthetic(rate=rate, prompt=str(load.prompt), output=str(load.output), duration=ends)
        deployment = SimulatedDeployment(
            prefill=pools["prefill"], decode=pools["decode"], acceptance=self.acceptance
        )
        outcome = simulate(arrivals, deployment, self.times)
        late = outcome.columns["arrived"] >= fills
        outcome = replace(outcome, columns={name: of[late] for name, of in outcome.columns.items()})
        s = summary(outcome, load.slo_ttft_ms, load.slo_tpot_ms).as_dict()
        names = ("median_ttft_ms", "p99_ttft_ms", "median_tpot_ms", "p99_tpot_ms", "slo_attainment")
        return {
            "rate": rate,
            "requests": s["completed"],
            **{n: s[n] for n in names},
            **_misses(outcome, load),
        }


def _misses(outcome: Any, load: Load) -> dict[str, float]:
    """Of the requests, those that miss a part of the SLO."""
    c = outcome.columns
    ttft = c["first_token"] - c["arrived"]
    tpot = (c["finished"] - c["first_token"]) / (load.output - 1)
    return {
        "ttft_missed": float(np.mean(ttft * 1e3 > load.slo_ttft_ms)),
        "tpot_missed": float(np.mean(tpot * 1e3 > load.slo_tpot_ms)),
    }


def render(found: dict[str, Any]) -> str:
    """The deployments, then the front."""
    lines = [line for m in found["deployments"] for line in _lines(m)]
    lines += ["", "decode: ms a token against tokens/s of an NPU, where no other has more of both"]
    lines += [f"{x['tpot_ms']:8.1f} {x['tokens_per_s']:8,.0f}   {named(x)}" for x in found["pareto"]]
    unfit = sum(found["unfit"].values())
    slow = found["candidates"] - found["predicted"] - unfit
    lines.append(
        f"{found['candidates']} candidates: {found['predicted']} predicted, {unfit} do not fit, {slow} are "
        "larger than one that misses the SLO"
    )
    return "\n".join(lines)


def named(x: dict[str, Any]) -> str:
    """A decode instance by its sizes."""
    return f"EP{x['ranks']}, batch {x['batch']}, microbatches {x['microbatches']}, drafts {x['drafts']}"


def _lines(m: dict[str, Any]) -> list[str]:
    p, d, s = m["prefill"], m["decode"], m["simulated"]
    pools = f"{m['prefill_instances']} prefill x {p['npus']}, {m['decode_instances']} decode x {d['npus']}"
    return [
        f"{s['rate']:8.2f} requests/s on {m['npus']} NPUs ({pools}); {m['requests_per_s']:.2f} if load were "
        f"steady, {m['tokens_per_s_npu']:,.0f} tokens/s each",
        f"         simulated: {s['slo_attainment']:.1%} in time; first token {s['median_ttft_ms']:.0f} ms "
        f"(p99 {s['p99_ttft_ms']:.0f}), a token {s['median_tpot_ms']:.1f} ms (p99 {s['p99_tpot_ms']:.1f})",
        f"         prefill EP{p['ranks']}, batch {p['batch']}, microbatches {p['microbatches']}: "
        f"{p['ttft_ms']:.0f} ms to the first token",
        f"         decode {named(d)}: {d['tpot_ms']:.1f} ms a token, bound by {d['bound']}; {m['why']}",
    ]


def _missed(first: dict[str, Any], load: Load, rate: float | None, npus: int) -> str:
    asked = "half the steady rate" if rate is None else f"{rate:g} requests/s"
    return (
        f"no deployment of {npus} NPUs serves {asked} with {ATTAINMENT:.0%} of requests within "
        f"{load.slo_ttft_ms:g} and {load.slo_tpot_ms:g} ms, though steady load would allow "
        f"{first['requests_per_s']:.2f} requests/s: give a longer SLO, more NPUs or a lower rate"
    )
