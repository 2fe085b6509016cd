"""Instances that could serve a load, each predicted from its own traced step."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from cmx_jax.analysis.cost.constants import Machine
from cmx_jax.analysis.predict.predict import predict
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

    @property
    def context(self) -> int:
        """Tokens that a decode step attends to, on average."""
        return self.prompt + self.output // 2

    def slo(self, step: str) -> tuple[str, float]:
        """What an instance is held to, and the most of it."""
        return ("ttft_ms", self.slo_ttft_ms) if step == "prefill" else ("tpot_ms", self.slo_tpot_ms)


def instance_layout(c: ModelConfig, on: Machine, step: str, ranks: int, microbatches: int) -> Layout:
    """Experts over all ranks of an instance, in INT8, an even number of slots; prompts are shared where heads
    can be (section 4.3.1)."""
    given: dict[str, Any] = {"wire": "int8", "redundant_slots": -c.n_routed_experts % ranks}
    if step == "decode":
        given["mailbox_rows"] = 0
    if step == "prefill" or on.kind == "gpu":
        given["exchange"] = "hierarchical"
    shares = isinstance(c.attention, MLAConfig) and c.num_attention_heads % ranks == 0
    given["share_sequences"] = step == "prefill" and on.kind == "ascend" and shares
    return expert_parallel(ranks, c.n_routed_experts, microbatches=microbatches, **given)


def candidates(
    c: ModelConfig, on: Machine, step: str, npus: int
) -> Iterator[tuple[Layout, int, tuple[int, ...]]]:
    """Layout, drafts, batches of instances for which there are NPUs."""
    for ranks in RANKS[on.kind, step]:
        if ranks > npus * on.ranks_per_npu:
            continue
        for microbatches in MICROBATCHES:
            layout = instance_layout(c, on, step, ranks, microbatches)
            for drafts in DRAFTS[step] if c.num_nextn_predict_layers else (0,):
                yield layout, drafts, BATCHES[step]


def predicted(
    c: ModelConfig,
    on: Machine,
    step: str,
    load: Load,
    npus: int,
    acceptance: float,
    unfit: dict[str, int],
    progress: Callable[[str], None],
) -> Iterator[dict[str, Any]]:
    """Instances of one pool, each with larger batches until one does not fit or misses the SLO."""
    slo, most = load.slo(step)
    for layout, drafts, batches in candidates(c, on, step, npus):
        shared = layout.sequence_ranks
        context = -(-load.prompt // shared) * shared if step == "prefill" else load.context
        for n, batch in enumerate(batches):
            progress(f"{step}: {layout.ranks} ranks, {batch} sequences an NPU")
            sizes: dict[str, Any] = {"batch": batch, "context": context, "drafts": drafts}
            try:
                one = predict(c, on, layout, step, mtp_acceptance=acceptance, **sizes)
            except CmxError as error:
                fits = "GB of a rank" not in str(error)
                unfit[str(error)] = unfit.get(str(error), 0) + (1 if fits else len(batches) - n)
                if fits:
                    continue
                break
            yield (found := _instance(c, on, layout, one, load))
            if found[slo] > most:
                break


def _instance(c: ModelConfig, on: Machine, layout: Layout, one: dict[str, Any], load: Load) -> dict[str, Any]:
    npus = layout.ranks // on.ranks_per_npu
    names = ("step", "batch", "drafts", "microbatches", "step_ms", "tokens_per_s", "tpot_ms", "bound")
    found = {"ranks": layout.ranks, "npus": npus} | {name: one[name] for name in names}
    if one["step"] == "prefill":
        transfer = transfer_ms(c, on, load.prompt, one["drafts"] > 0)
        found |= {"transfer_ms": transfer, "ttft_ms": 1.5 * one["step_ms"] + transfer}
    each = load.prompt if one["step"] == "prefill" else load.output - 1
    return found | {"requests_per_s": one["tokens_per_s"] * npus / each}


def transfer_ms(c: ModelConfig, on: Machine, tokens: int, mtp: bool) -> float:
    """Of moving rows from one rank to another over its share of RDMA (section 4.3.3); `mtp`: whether the MTP
    layer has rows too."""
    return tokens * page_bytes(c, 1, "auto", mtp) / (RDMA / on.ranks_per_npu * 1e6)
