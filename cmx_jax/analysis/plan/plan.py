"""Chooses the deployments that serve a workload within an SLO when requests arrive at random.

`plan_search.py` finds deployments by steady load. The simulator then gives Poisson arrivals to the
best of them, with step times predicted at the mean context of the load. Requests that arrive once the decode
batch has filled are measured. A deployment serves a rate if `ATTAINMENT` of them have their first token and
the others in time:

* *with a rate*: a deployment that misses it gets another instance, in the pool whose part of the SLO is
  missed more often, until it serves the rate. If there are not enough NPUs, the deployment is dropped and the
  next one takes its place.
* *without a rate*: the deployment's rate is the largest part of the steady rate that it serves, in steps of
  1 / `RATE_STEPS`. A deployment that does not serve half of the steady rate is dropped.
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace

import numpy as np

from cmx_jax.analysis.plan.plan_search import DeploymentPlan, SearchResult, combine, order, search
from cmx_jax.analysis.predict.candidates import instance_layout
from cmx_jax.analysis.predict.plan_request import PlanRequest, Workload
from cmx_jax.analysis.simulate.predicted import Predicted
from cmx_jax.analysis.simulate.simulated_deployment import SimulatedDeployment
from cmx_jax.analysis.simulate.simulation_metrics import summary
from cmx_jax.analysis.simulate.supernodes import SimulationOutcome, simulate
from cmx_jax.analysis.simulate.workload import synthetic
from cmx_jax.analysis.trace.abstract_steps import PAGE_WIDTH
from cmx_jax.errors import CmxError
from cmx_jax.serving.scheduling.pages import pages_for

ATTAINMENT = 0.9
RATE_STEPS = 32
FILL = 2  # times the longest that a request may take: before this the decode batch fills
MEASURED = 2000  # requests, at least


@dataclass(frozen=True)
class ServedRate:
    """Latencies of a deployment at one rate of simulated arrivals.

    Attributes:
      rate: Requests per second that arrive.
      requests: Number of requests that were measured.
      median_ttft_ms: Median time to the first token.
      p99_ttft_ms: 99th percentile of the time to the first token.
      median_tpot_ms: Median time per output token.
      p99_tpot_ms: 99th percentile of the time per output token.
      slo_attainment: Fraction of requests that met both objectives.
      ttft_missed: Fraction of requests whose first token was late.
      tpot_missed: Fraction of requests whose other tokens were late.
    """

    rate: float
    requests: int
    median_ttft_ms: float
    p99_ttft_ms: float
    median_tpot_ms: float
    p99_tpot_ms: float
    slo_attainment: float
    ttft_missed: float
    tpot_missed: float


@dataclass(frozen=True)
class ServedDeployment:
    """A deployment and the rate of simulated arrivals that it serves.

    Attributes:
      deployment: Instances, and the load that they serve if it is steady.
      simulated: Latencies with simulated arrivals.
    """

    deployment: DeploymentPlan
    simulated: ServedRate


@dataclass(frozen=True)
class Plan:
    """Deployments that serve a workload.

    Attributes:
      request: Model, workload and machine.
      deployments: The best deployments that keep the SLO with simulated arrivals, the best first.
      search: Result of the search under steady load.
    """

    request: PlanRequest
    deployments: list[ServedDeployment]
    search: SearchResult

    def as_dict(self) -> dict[str, object]:
        """Returns the plan as `cmx plan --json` prints it."""
        return {
            "load": {**vars(self.request.workload), "rate": self.request.rate},
            "hardware": self.request.hardware,
            "npus": self.request.npus,
            "deployments": [
                {**x.deployment.as_dict(), "simulated": asdict(x.simulated)} for x in self.deployments
            ],
            "decode": [instance.as_dict() for instance in self.search.decode],
            "pareto": [instance.as_dict() for instance in self.search.pareto],
            "candidates": self.search.candidates,
            "predicted": self.search.predicted,
            "unfit": self.search.unfit,
        }


def plan(request: PlanRequest, *, best: int = 3, progress: Callable[[str], None] = lambda _: None) -> Plan:
    """Returns the deployments that serve a workload.

    Args:
      request: Model, workload and machine.
      best: Number of deployments to return, at most.
      progress: Function that is called with a line on each prediction and simulation.

    Raises:
      CmxError: Nothing meets the SLO or the rate; the message says what would.
    """
    result, rate = search(request, progress), request.rate
    tried = result.deployments[: 2 * best]
    kept: list[ServedDeployment] = []
    for n, deployment in enumerate(tried, 1):
        progress(f"simulating deployment {n} of at most {len(tried)}")
        trial = Trial(request, deployment)
        served = trial.largest_rate() if rate is None else trial.enlarged(rate)
        kept += [served] if served else []
        if len(kept) == best:
            break
    if not kept:
        raise CmxError(_missed(tried[0], request))
    kept.sort(key=lambda m: order(m.deployment, rate) if rate else (-m.simulated.rate, m.deployment.npus))
    return Plan(request, kept, result)


class Trial:
    """A deployment that serves simulated arrivals in virtual time.

    Args:
      request: Model, workload and machine.
      deployment: Deployment found by `search`.
    """

    def __init__(self, request: PlanRequest, deployment: DeploymentPlan):
        self.request, self.deployment = request, deployment
        prefill, decode = deployment.prefill, deployment.decode
        machine, workload = request.machine, request.workload
        layouts = [
            instance_layout(request.config, machine, x.step, x.ranks, x.microbatches)
            for x in (prefill, decode)
        ]
        self.times = Predicted(
            request.config, request.hardware, *layouts, drafts=decode.drafts, context=workload.context
        )
        self.acceptance = self.times.acceptance(request.mtp_acceptance)
        prompts = prefill.batch * layouts[0].sequence_ranks // machine.ranks_per_npu
        budget = prompts * pages_for(workload.prompt, PAGE_WIDTH) * PAGE_WIDTH
        sequences = decode.batch // machine.ranks_per_npu
        self.pools = {
            "prefill": self.times.pool("prefill", 1, budget=budget),
            "decode": self.times.pool("decode", 1, sequences=sequences),
        }

    def largest_rate(self) -> ServedDeployment | None:
        """Returns the deployment at its largest rate; None if that is below half the steady rate."""
        served: dict[int, ServedRate] = {}
        low, high = RATE_STEPS // 2 - 1, RATE_STEPS
        middle = high  # most serve what they do under steady load
        while low < high:
            simulated = self.serve(self.deployment, self.deployment.requests_per_s * middle / RATE_STEPS)
            if simulated.slo_attainment >= ATTAINMENT:
                low, served[middle] = middle, simulated
            else:
                high = middle - 1
            middle = (low + high + 1) // 2
        return ServedDeployment(self.deployment, served[low]) if served else None

    def enlarged(self, rate: float) -> ServedDeployment | None:
        """Returns the deployment with enough instances for `rate`; None if they need too many NPUs."""
        deployment = self.deployment
        while deployment.npus <= self.request.npus:
            simulated = self.serve(deployment, rate)
            if simulated.slo_attainment >= ATTAINMENT:
                return ServedDeployment(deployment, simulated)
            counts = {step: deployment.instances(step) for step in self.pools}
            counts["decode" if simulated.tpot_missed > simulated.ttft_missed else "prefill"] += 1
            deployment = combine(
                deployment.prefill,
                counts["prefill"],
                deployment.decode,
                counts["decode"],
                self.request.workload,
            )
        return None

    def serve(self, deployment: DeploymentPlan, rate: float) -> ServedRate:
        """Simulates arrivals at `rate` and returns the latencies once the decode batch has filled."""
        workload = self.request.workload
        longest = (workload.slo_ttft_ms + workload.slo_tpot_ms * (workload.output - 1)) / 1e3
        filled = FILL * longest
        duration = filled + max(longest, MEASURED / rate)
        pools = {
            step: replace(pool, instances=deployment.instances(step)) for step, pool in self.pools.items()
        }
        arrivals = synthetic(
            rate=rate, prompt=str(workload.prompt), output=str(workload.output), duration=duration
        )
        simulated = SimulatedDeployment(
            prefill=pools["prefill"], decode=pools["decode"], acceptance=self.acceptance
        )
        outcome = simulate(arrivals, simulated, self.times)
        measured = outcome.columns["arrived"] >= filled
        columns = {name: column[measured] for name, column in outcome.columns.items()}
        return _served(rate, replace(outcome, columns=columns), workload)


def _served(rate: float, outcome: SimulationOutcome, workload: Workload) -> ServedRate:
    report = summary(outcome, workload.slo_ttft_ms, workload.slo_tpot_ms)
    assert report.goodput is not None  # there are objectives
    c = outcome.columns
    ttft = c["first_token"] - c["arrived"]
    tpot = (c["finished"] - c["first_token"]) / (workload.output - 1)
    return ServedRate(
        rate=rate,
        requests=report.completed,
        median_ttft_ms=report.latencies["ttft"].median,
        p99_ttft_ms=report.latencies["ttft"].percentiles[99],
        median_tpot_ms=report.latencies["tpot"].median,
        p99_tpot_ms=report.latencies["tpot"].percentiles[99],
        slo_attainment=report.goodput.slo_attainment,
        ttft_missed=float(np.mean(ttft * 1e3 > workload.slo_ttft_ms)),
        tpot_missed=float(np.mean(tpot * 1e3 > workload.slo_tpot_ms)),
    )


def render(result: Plan) -> str:
    """Returns a plan as text: the deployments, then the Pareto front."""
    steady = result.search
    lines = [line for served in result.deployments for line in _lines(served)]
    lines += ["", "decode: ms a token against tokens/s of an NPU, where no other has more of both"]
    lines += [f"{x.latency_ms:8.1f} {x.tokens_per_s:8,.0f}   {x.sizes}" for x in steady.pareto]
    unfit = sum(steady.unfit.values())
    slow = steady.candidates - steady.predicted - unfit
    lines.append(
        f"{steady.candidates} candidates: {steady.predicted} predicted, {unfit} do not fit, {slow} are "
        "larger than one that misses the SLO"
    )
    return "\n".join(lines)


def _lines(served: ServedDeployment) -> list[str]:
    m, s = served.deployment, served.simulated
    p, d = m.prefill, m.decode
    pools = f"{m.prefill_instances} prefill x {p.npus}, {m.decode_instances} decode x {d.npus}"
    return [
        f"{s.rate:8.2f} requests/s on {m.npus} NPUs ({pools}); {m.requests_per_s:.2f} if load were "
        f"steady, {m.tokens_per_s_npu:,.0f} tokens/s each",
        f"         simulated: {s.slo_attainment:.1%} in time; first token {s.median_ttft_ms:.0f} ms "
        f"(p99 {s.p99_ttft_ms:.0f}), a token {s.median_tpot_ms:.1f} ms (p99 {s.p99_tpot_ms:.1f})",
        f"         prefill EP{p.ranks}, batch {p.batch}, microbatches {p.microbatches}: "
        f"{p.latency_ms:.0f} ms to the first token",
        f"         decode {d.sizes}: {d.latency_ms:.1f} ms a token, bound by {d.bound}; {m.bottleneck}",
    ]


def _missed(first: DeploymentPlan, request: PlanRequest) -> str:
    rate = "half the steady rate" if request.rate is None else f"{request.rate:g} requests/s"
    return (
        f"no deployment of {request.npus} NPUs serves {rate} with {ATTAINMENT:.0%} of requests within "
        f"{request.workload.slo_ttft_ms:g} and {request.workload.slo_tpot_ms:g} ms, though steady load would "
        f"allow {first.requests_per_s:.2f} requests/s: give a longer SLO, more NPUs or a lower rate"
    )
