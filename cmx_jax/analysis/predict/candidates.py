"""Instances that could serve a workload, each predicted from its own traced step."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from cmx_jax.analysis.cost.constants import MachineModel
from cmx_jax.analysis.predict.plan_request import PlanRequest
from cmx_jax.analysis.predict.predict import predict
from cmx_jax.analysis.predict.prediction import Prediction
from cmx_jax.analysis.predict.roofline import DoesNotFit
from cmx_jax.analysis.trace.memory import page_bytes
from cmx_jax.errors import CmxError
from cmx_jax.mesh.layout import Layout, expert_parallel
from cmx_jax.mesh.supernode import CLOUDMATRIX384
from cmx_jax.model.config import MLAConfig, ModelConfig

RANKS = {  # of an instance: dies of whole nodes, or GPUs
    ("ascend", "decode"): (64, 128, 320),
    ("gpu", "decode"): (32, 64, 144),
    ("ascend", "prefill"): (16, 32, 64),
    ("gpu", "prefill"): (16, 32, 64),
}
BATCHES = {"decode": (8, 16, 24, 32, 48, 64, 96, 128, 160, 192, 256), "prefill": (1, 2, 4, 8)}
DRAFTS = {"decode": (0, 1, 2), "prefill": (0, 1)}  # in prefill: whether the MTP layer runs
MICROBATCHES = (1, 2)
RDMA = CLOUDMATRIX384.planes[1].npu_gb_s  # an H800 has as much


@dataclass(frozen=True)
class Candidate:
    """An instance to predict, and its batches in increasing order.

    Attributes:
      layout: Layout of the model on the instance's ranks.
      drafts: Number of MTP drafts; in prefill, nonzero if the MTP layer runs.
      batches: Numbers of sequences per NPU to try.
    """

    layout: Layout
    drafts: int
    batches: tuple[int, ...]


@dataclass(frozen=True)
class InstancePlan:
    """A predicted instance of one pool.

    Attributes:
      ranks: Number of ranks.
      npus: Number of NPUs.
      step: Either `decode` or `prefill`.
      batch: Number of sequences per NPU.
      drafts: Number of MTP drafts; in prefill, nonzero if the MTP layer runs.
      microbatches: Number of streams of a step.
      step_ms: Time of a step.
      tokens_per_s: Tokens per second of an NPU.
      bound: Resource or phase that accounts for most of a step.
      latency_ms: Time that the SLO limits: time to the first token (prefill), or per output token (decode).
      requests_per_s: Requests per second under steady load.
      transfer_ms: Time in which a prompt's rows travel to a decode instance (prefill only).
    """

    ranks: int
    npus: int
    step: str
    batch: int
    drafts: int
    microbatches: int
    step_ms: float
    tokens_per_s: float
    bound: str
    latency_ms: float
    requests_per_s: float
    transfer_ms: float | None = None

    @property
    def sizes(self) -> str:
        """The sizes in words, for people."""
        return f"EP{self.ranks}, batch {self.batch}, microbatches {self.microbatches}, drafts {self.drafts}"

    def as_dict(self) -> dict[str, object]:
        """Returns the instance as `cmx plan --json` prints it."""
        prefill = self.step == "prefill"
        times = {"transfer_ms": self.transfer_ms, "ttft_ms": self.latency_ms} if prefill else {}
        return {
            "ranks": self.ranks,
            "npus": self.npus,
            "step": self.step,
            "batch": self.batch,
            "drafts": self.drafts,
            "microbatches": self.microbatches,
            "step_ms": self.step_ms,
            "tokens_per_s": self.tokens_per_s,
            "tpot_ms": None if prefill else self.latency_ms,
            "bound": self.bound,
            **times,
            "requests_per_s": self.requests_per_s,
        }


def instance_layout(
    c: ModelConfig, machine: MachineModel, step: str, ranks: int, microbatches: int
) -> Layout:
    """Returns the layout of an instance.

    Experts are in INT8 over all ranks, the same number of slots on each. Prompts are shared by ranks if the
    attention heads can be divided among them (section 4.3.1).
    """
    divisible = isinstance(c.attention, MLAConfig) and c.num_attention_heads % ranks == 0
    return expert_parallel(
        ranks,
        c.n_routed_experts,
        wire="int8",
        redundant_slots=-c.n_routed_experts % ranks,
        microbatches=microbatches,
        mailbox_rows=0 if step == "decode" else None,
        exchange="hierarchical" if step == "prefill" or machine.kind == "gpu" else "flat",
        share_sequences=step == "prefill" and machine.kind == "ascend" and divisible,
    )


def candidates(request: PlanRequest, step: str) -> Iterator[Candidate]:
    """Yields the instances of one pool that the available NPUs can hold."""
    c, machine = request.config, request.machine
    for ranks in RANKS[machine.kind, step]:
        if ranks > request.npus * machine.ranks_per_npu:
            continue
        for microbatches in MICROBATCHES:
            layout = instance_layout(c, machine, step, ranks, microbatches)
            for drafts in DRAFTS[step] if c.num_nextn_predict_layers else (0,):
                yield Candidate(layout, drafts, BATCHES[step])


def predict_instances(
    request: PlanRequest, step: str, unfit: dict[str, int], progress: Callable[[str], None]
) -> Iterator[InstancePlan]:
    """Predicts the candidates of one pool, each with larger batches until one does not fit or misses the SLO.

    Args:
      request: Model, workload and machine.
      step: Either `prefill` or `decode`.
      unfit: Counts of batches that cannot run, keyed by the reason; updated.
      progress: Function that is called with a line on each prediction.
    """
    workload, slo_ms = request.workload, request.workload.slo_ms(step)
    for candidate in candidates(request, step):
        layout, shared = candidate.layout, candidate.layout.sequence_ranks
        context = -(-workload.prompt // shared) * shared if step == "prefill" else workload.context
        for n, batch in enumerate(candidate.batches):
            progress(f"{step}: {layout.ranks} ranks, {batch} sequences an NPU")
            try:
                prediction = predict(
                    request.config,
                    request.machine,
                    layout,
                    step,
                    batch=batch,
                    context=context,
                    drafts=candidate.drafts,
                    mtp_acceptance=request.mtp_acceptance,
                )
            except DoesNotFit as error:  # nor do larger batches
                unfit[str(error)] = unfit.get(str(error), 0) + len(candidate.batches) - n
                break
            except CmxError as error:
                unfit[str(error)] = unfit.get(str(error), 0) + 1
                continue
            instance = _instance(request, layout, prediction)
            yield instance
            if instance.latency_ms > slo_ms:
                break


def _instance(request: PlanRequest, layout: Layout, prediction: Prediction) -> InstancePlan:
    machine, workload = request.machine, request.workload
    npus = layout.ranks // machine.ranks_per_npu
    if prediction.tpot_ms is None:
        transfer = transfer_ms(request.config, machine, workload.prompt, prediction.drafts > 0)
        latency, tokens = 1.5 * prediction.step_ms + transfer, workload.prompt
    else:
        transfer, latency, tokens = None, prediction.tpot_ms, workload.output - 1
    return InstancePlan(
        ranks=layout.ranks,
        npus=npus,
        step=prediction.step,
        batch=prediction.batch,
        drafts=prediction.drafts,
        microbatches=prediction.microbatches,
        step_ms=prediction.step_ms,
        tokens_per_s=prediction.tokens_per_s,
        bound=prediction.bound,
        latency_ms=latency,
        requests_per_s=prediction.tokens_per_s * npus / tokens,
        transfer_ms=transfer,
    )


def transfer_ms(c: ModelConfig, machine: MachineModel, tokens: int, mtp: bool) -> float:
    """Returns the time of moving KV rows from one rank to another over its share of RDMA (section 4.3.3).

    Args:
      c: Configuration of the model.
      machine: Machine of both ranks.
      tokens: Number of tokens whose rows are moved.
      mtp: Count the MTP layer's rows, too.
    """
    return tokens * page_bytes(c, 1, "auto", mtp) / (RDMA / machine.ranks_per_npu * 1e6)
