"""Finds the deployments that could serve a workload.

A deployment is a choice of layouts, batches, drafts and the ratio of prefill to decode. Instances are those
of `analysis/predict/candidates.py`. Further assumptions: load is steady; a prompt waits half a prefill step,
runs for one, and its rows travel over RDMA; a sequence attends to its prompt and half its output on average.
`analysis/plan/plan.py` drops the assumption of steady load.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

from cmx_jax.analysis.predict.candidates import InstancePlan, candidates, predict_instances
from cmx_jax.analysis.predict.plan_request import PlanRequest, Workload
from cmx_jax.errors import CmxError

STEPS = ("prefill", "decode")


@dataclass(frozen=True)
class DeploymentPlan:
    """Numbers of prefill and decode instances, and the load that they serve.

    Attributes:
      requests_per_s: Requests per second under steady load.
      npus: Number of NPUs of all instances.
      tokens_per_s_npu: Output tokens per second of an NPU under steady load.
      prefill_instances: Number of prefill instances.
      decode_instances: Number of decode instances.
      prefill: Prefill instance.
      decode: Decode instance.
      bottleneck: Sentence on the pool that limits the deployment, and how busy the other one is.
    """

    requests_per_s: float
    npus: int
    tokens_per_s_npu: float
    prefill_instances: int
    decode_instances: int
    prefill: InstancePlan
    decode: InstancePlan
    bottleneck: str

    def instances(self, step: str) -> int:
        """Returns the number of instances for `prefill` or `decode`."""
        return self.prefill_instances if step == "prefill" else self.decode_instances

    def as_dict(self) -> dict[str, object]:
        """Returns the deployment as `cmx plan --json` prints it."""
        return {
            "requests_per_s": self.requests_per_s,
            "npus": self.npus,
            "tokens_per_s_npu": self.tokens_per_s_npu,
            "prefill_instances": self.prefill_instances,
            "decode_instances": self.decode_instances,
            "prefill": self.prefill.as_dict(),
            "decode": self.decode.as_dict(),
            "why": self.bottleneck,
        }


@dataclass(frozen=True)
class SearchResult:
    """Result of a search under steady load.

    Attributes:
      deployments: Deployments with one batch of each decode instance, the best first: most requests per
        second, or with a rate the fewest NPUs.
      decode: Decode instances that were predicted.
      pareto: Decode instances of which no other has both less time per token and more tokens per second of
        an NPU, ordered by time per token.
      candidates: Number of instances of both pools, counting each batch.
      predicted: Number of them that were predicted.
      unfit: Number of those that cannot run, keyed by the reason.
    """

    deployments: list[DeploymentPlan]
    decode: list[InstancePlan]
    pareto: list[InstancePlan]
    candidates: int
    predicted: int
    unfit: dict[str, int]


def search(request: PlanRequest, progress: Callable[[str], None] = lambda _: None) -> SearchResult:
    """Searches the instances of both pools, then the number of each.

    Larger batches of an instance are predicted until one does not fit, or misses its SLO.

    Args:
      request: Model, workload and machine.
      progress: Function that is called with a line on each prediction.

    Raises:
      CmxError: Nothing meets the SLO or the rate; the message says what would.
    """
    workload, npus, rate = request.workload, request.npus, request.rate
    unfit: dict[str, int] = {}
    instances = {step: list(predict_instances(request, step, unfit, progress)) for step in STEPS}
    for step, pool in instances.items():
        if not pool:
            reason = next(iter(unfit), "too few")
            raise CmxError(f"{npus} NPUs of {request.hardware} hold no {step} instance: {reason}")
    within = {step: _within_slo(pool, step, workload) for step, pool in instances.items()}
    pairs = [(p, d) for p in within["prefill"] for d in within["decode"] if p.drafts == min(d.drafts, 1)]
    deployments = [m for p, d in pairs if (m := deploy(p, d, workload, npus, rate))]
    if not deployments:
        unlimited = [m.requests_per_s for p, d in pairs if (m := deploy(p, d, workload, npus, None))]
        raise CmxError(_too_much(request, max(unlimited, default=0)))
    deployments.sort(key=lambda m: order(m, rate))
    return SearchResult(
        deployments=_distinct(deployments),
        decode=instances["decode"],
        pareto=_pareto(instances["decode"]),
        candidates=sum(len(x.batches) for step in STEPS for x in candidates(request, step)),
        predicted=sum(map(len, instances.values())),
        unfit=unfit,
    )


def order(deployment: DeploymentPlan, rate: float | None) -> tuple[float, ...]:
    """Sort key: most requests per second first, with a rate the fewest NPUs; of equals the fastest tokens."""
    npus, served = deployment.npus, -deployment.requests_per_s
    return (*((npus, served) if rate else (served, npus)), deployment.decode.latency_ms)


def _within_slo(pool: list[InstancePlan], step: str, workload: Workload) -> list[InstancePlan]:
    slo_ms = workload.slo_ms(step)
    within = [x for x in pool if x.latency_ms <= slo_ms]
    if not within:
        fastest = min(pool, key=lambda x: x.latency_ms)
        goal = "a token" if step == "decode" else "to the first token"
        raise CmxError(
            f"nothing meets {slo_ms:g} ms {goal}: the fastest takes {fastest.latency_ms:.1f} ms, "
            f"{fastest.ranks} ranks with {fastest.batch} sequences an NPU"
        )
    return within


def _too_much(request: PlanRequest, largest: float) -> str:
    available = f"{request.npus} NPUs of {request.hardware}"
    if request.rate is None or not largest:
        return f"{available} do not hold both a prefill and a decode instance, expected more NPUs"
    return (
        f"{available} cannot serve {request.rate:g} requests/s, expected at most {largest:.2f}, or more NPUs"
    )


def deploy(
    prefill: InstancePlan, decode: InstancePlan, workload: Workload, npus: int, rate: float | None
) -> DeploymentPlan | None:
    """Returns the deployment that serves a rate, or the largest rate; None if it needs too many NPUs.

    Args:
      prefill: Prefill instance.
      decode: Decode instance.
      workload: Lengths of the requests.
      npus: Number of NPUs available.
      rate: Requests per second to serve; None to serve as many as possible.
    """

    def option(decoders: int, goal: float) -> tuple[float, int, int]:
        prefillers = max(math.ceil(goal / prefill.requests_per_s - 1e-9), 1)
        largest = (npus - decoders * decode.npus) // prefill.npus
        prefillers = prefillers if rate else min(prefillers, largest)
        served = min(decoders * decode.requests_per_s, prefillers * prefill.requests_per_s)
        return (served if 1 <= prefillers <= largest else 0.0, decoders, prefillers)

    if rate:
        counts = [math.ceil(rate / decode.requests_per_s - 1e-9)]
    else:
        counts = list(range(1, npus // decode.npus + 1))
    options = [option(count, rate or count * decode.requests_per_s) for count in counts]
    served, decoders, prefillers = max(options, default=(0.0, 0, 0))
    if not served:
        return None
    return combine(prefill, prefillers, decode, decoders, workload)


def combine(
    prefill: InstancePlan, prefillers: int, decode: InstancePlan, decoders: int, workload: Workload
) -> DeploymentPlan:
    """Returns the deployment with the given numbers of instances.

    Args:
      prefill: Prefill instance.
      prefillers: Number of prefill instances.
      decode: Decode instance.
      decoders: Number of decode instances.
      workload: Lengths of the requests.
    """
    rates = prefillers * prefill.requests_per_s, decoders * decode.requests_per_s
    npus = decoders * decode.npus + prefillers * prefill.npus
    return DeploymentPlan(
        requests_per_s=min(rates),
        npus=npus,
        tokens_per_s_npu=min(rates) * workload.output / npus,
        prefill_instances=prefillers,
        decode_instances=decoders,
        prefill=prefill,
        decode=decode,
        bottleneck=_bottleneck(*rates),
    )


def _bottleneck(prefill: float, decode: float) -> str:
    """Returns a sentence on the pool with the smaller rate, and on how busy the other one is."""
    slower, faster = ("prefill", "decode") if prefill <= decode else ("decode", "prefill")
    busy = min(prefill, decode) / max(prefill, decode)
    return f"{slower} limits it, {faster} is busy {busy:.0%} of the time"


def _distinct(deployments: list[DeploymentPlan]) -> list[DeploymentPlan]:
    """Keeps the first of those deployments whose decode instances differ in their batch alone."""
    first: dict[tuple[int, ...], DeploymentPlan] = {}
    for m in deployments:
        first.setdefault((m.decode.ranks, m.decode.drafts, m.decode.microbatches), m)
    return list(first.values())


def _pareto(pool: list[InstancePlan]) -> list[InstancePlan]:
    """Returns the instances with more tokens per second than all faster ones, ordered by time per token."""
    front: list[InstancePlan] = []
    for x in sorted(pool, key=lambda x: (x.latency_ms, -x.tokens_per_s)):
        if not front or x.tokens_per_s > front[-1].tokens_per_s:
            front.append(x)
    return front
