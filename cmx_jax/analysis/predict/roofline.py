"""Limits of a step on a machine: the memory that it needs, and the least time that it could take."""

from dataclasses import dataclass

from cmx_jax.analysis.cost.constants import MachineModel
from cmx_jax.analysis.cost.operator_times import peak
from cmx_jax.analysis.predict.operators import Operator, Step, attention_work, loops
from cmx_jax.analysis.predict.tasks import nodes_reached
from cmx_jax.analysis.trace.memory import by_layout
from cmx_jax.errors import CmxError
from cmx_jax.mesh.exchange import message_bytes
from cmx_jax.model.sharding import shared_in_slots


class DoesNotFit(CmxError):
    """A step needs more memory than a rank has."""


@dataclass(frozen=True)
class RankMemory:
    """Memory of a rank that a step needs, in GB.

    Attributes:
      weights: Weights, and whatever is neither cache nor mailbox.
      cache: KV cache.
      mailboxes: Buffers of dispatch and combine.
    """

    weights: float
    cache: float
    mailboxes: float

    @property
    def total(self) -> float:
        """Sum of all parts, in GB."""
        return self.weights + self.cache + self.mailboxes


@dataclass(frozen=True)
class Roofline:
    """The least time that a step could take, in ms: everything at its peak, all overlapped, even load.

    Attributes:
      step_ms: Longest of the three times below.
      bound: Name of the longest: `compute`, `memory` or `network`.
      compute_ms: Time of all products.
      memory_ms: Time of reading weights, keys and values.
      network_ms: Time of all messages.
    """

    step_ms: float
    bound: str
    compute_ms: float
    memory_ms: float
    network_ms: float


def memory_of(step: Step, machine: MachineModel, batch: int) -> RankMemory:
    """Returns the memory that a step needs on each rank.

    Args:
      step: Step to run.
      machine: Machine that runs it.
      batch: Number of sequences per NPU, for the message of the error.

    Raises:
      DoesNotFit: A rank has less memory; the message says how many sequences would fit.
    """
    parts = by_layout(step.c, step.layout, step.sequences, step.context, step.kind == "prefill", step.drafts)
    buffers = {"dispatch buffer", "combine buffer"}
    cache = parts["cache"] / 1e9
    if step.layout.sequence:  # every rank keeps the rows of the prompts whose pages it owns
        cache /= step.layout.sequence_ranks
    needed = RankMemory(
        weights=sum(size for name, size in parts.items() if name != "cache" and name not in buffers) / 1e9,
        cache=cache,
        mailboxes=sum(parts.get(name, 0) for name in buffers) / 1e9,
    )
    if needed.total > machine["hbm_gb"]:
        raise DoesNotFit(_does_not_fit(step, machine, batch, needed))
    return needed


def _does_not_fit(step: Step, machine: MachineModel, batch: int, needed: RankMemory) -> str:
    available = machine["hbm_gb"]
    per_sequence = (needed.cache + needed.mailboxes) / batch
    multiple = step.layout.microbatches * (1 if step.layout.sequence else machine.ranks_per_npu)
    largest = int((available - needed.weights) / per_sequence) if needed.weights < available else 0
    largest -= largest % multiple
    parts = ", ".join(f"{name} {gb:.1f}" for name, gb in vars(needed).items())
    fits = f"at most {largest} fit" if largest else "not even one does: take more ranks"
    return (
        f"batch {batch} of {step.context} tokens needs {needed.total:.1f} GB of a rank's "
        f"{available:g} ({parts}): {fits}"
    )


def roofline(step: Step, machine: MachineModel) -> Roofline:
    """Returns the least time that a step could take on a machine."""
    ms = {"compute": 0.0, "memory": 0.0, "network": 0.0}
    copies = step.c.num_experts_per_tok + shared_in_slots(step.c, step.layout)
    ranks = step.layout.expert_ranks
    messages = step.stream_tokens * copies * max(ranks - machine["near_ranks"], 0) / ranks
    for loop in loops(step):
        for operator in (o for operators in loop.streams.values() for o in operators):
            for resource, us in _least_us(operator, step, machine, messages).items():
                ms[resource] += loop.times * us / 1e3
    bound = max(ms, key=lambda resource: ms[resource])
    return Roofline(ms[bound], bound, ms["compute"], ms["memory"], ms["network"])


def _least_us(operator: Operator, step: Step, machine: MachineModel, messages: float) -> dict[str, float]:
    """Returns the least time of one operator in microseconds, keyed by resource.

    Args:
      operator: Operator of the step.
      step: Step to which the operator belongs.
      machine: Machine that runs the step.
      messages: Number of messages per stream that leave a rank in a dispatch or combine.
    """
    c, stage, network = step.c, operator.stage, machine["network_peak_gb_s"] * 1e3
    memory = machine["hbm_gb_s"] * 1e3
    if stage == "FusedAttention":
        flops, moved = attention_work(operator, step)
        return {"compute": flops / peak(machine, "bfloat16") / 1e6, "memory": moved / memory}
    if stage in ("Dispatch", "Combine"):
        size = c.hidden_size * 2 if stage == "Combine" else message_bytes(c.hidden_size, step.layout.wire)
        if machine.kind == "gpu" and step.kind == "prefill":
            reached = nodes_reached(c, step.layout.expert_ranks, machine) - 1
            return {"network": step.stream_tokens * max(reached, 0) * size / network}
        if machine.kind == "gpu":  # what stays on the node may go by NVLink
            messages = messages * max(1 - machine.ranks_per_node / step.layout.expert_ranks, 0)
        return {"network": messages * size / network}
    compute = moved = 0.0
    rows = step.stream_tokens * (c.num_experts_per_tok + shared_in_slots(c, step.layout))
    for p in operator.products:
        batch, _, k, n = p.shape
        item = 1 if p.dtype == "int8" else 2
        if stage == "MLP":
            batch = step.layout.slots_per_rank
            compute += 2 * rows * k * n / peak(machine, p.dtype) / 1e6
        else:
            compute += p.flops / peak(machine, p.dtype) / 1e6
        moved += batch * k * n * item
    sent = sum(x.wire_bytes for x in operator.collectives)
    return {"compute": compute, "memory": moved / memory, "network": sent / network}
