"""A step's operators as tasks: the engines of a rank that each one runs on, its share of them, its duration.

* *CloudMatrix384, decode* (section 4.2.3): attention runs on some of a die's matrix and vector cores, MoE on
  the others. Layers without MoE, and operators that belong to no stream, have the whole die.
* *CloudMatrix384, prefill* (section 4.3.2): matrix cores run attention, shared experts and MLP; vector cores
  run the computing part of dispatch and combine, SDMA their transfers. SP-TP-SP's collectives are part of
  attention: the section names no engine that runs them in parallel.
* *GPUs*: dispatch and combine use no SMs in decode (DeepEP's hooks), and hold some of them in prefill.

A single stream has the whole rank and runs its operators one after the other.
"""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from cmx_jax.analysis.cost import operator_times as cost
from cmx_jax.analysis.cost.constants import MachineModel
from cmx_jax.analysis.cost.overlap import Task
from cmx_jax.analysis.predict.operators import ATTENTION, Loop, Operator, Step, attention_work
from cmx_jax.model.config import MLAConfig, ModelConfig
from cmx_jax.model.sharding import shared_in_slots

MOE = ("Gate", "SharedExpert", "Dispatch", "MLP", "Combine")
FUSED = ("MLAProlog", "QKV")  # one kernel on the Ascend, however many products (section 4.2.2)
CORES = ("attention cores", "MoE cores")


@dataclass(frozen=True)
class CostContext:
    """Conditions under which a step's operators run.

    Attributes:
      step: Step to which the operators belong.
      machine: Machine that runs the step.
      imbalance: Load of the busiest expert rank relative to the mean.
      attention_share: Fraction of a rank's cores that attention has, if attention and MoE have their own.
      memory_load: Fraction of the memory's time that each engine takes, keyed by engine.
    """

    step: Step
    machine: MachineModel
    imbalance: float
    attention_share: float = 0.5
    memory_load: Mapping[str, float] = field(default_factory=dict)

    def engines(self, stage: str, streamed: bool) -> tuple[tuple[str, ...], cost.Share]:
        """Returns the engines that a stage occupies, and its share of the rank.

        Args:
          stage: Stage of the operator.
          streamed: True for an operator of a stream.
        """
        if not streamed or self.step.layout.microbatches == 1:
            return CORES, cost.ALL
        engines: tuple[str, ...] = CORES
        cores = 1.0
        if self.machine.kind == "gpu":
            if stage in ("Dispatch", "Combine"):
                engines = ("network",)
            elif self.step.kind == "prefill":
                cores = 1 - self.machine["exchange_cores"] / self.machine["cores"]
        elif self.step.kind == "decode" and stage in ATTENTION:
            engines, cores = CORES[:1], self.attention_share
        elif self.step.kind == "decode" and stage in MOE:
            engines, cores = CORES[1:], 1 - self.attention_share
        taken = sum(part for engine, part in self.memory_load.items() if engine not in engines)
        return engines, cost.Share(cores, max(1 - taken, 0.1))

    @property
    def copies(self) -> int:
        """Number of messages per token in a dispatch or combine."""
        return self.step.c.num_experts_per_tok + shared_in_slots(self.step.c, self.step.layout)


def chains(loops: Sequence[Loop], context: CostContext) -> tuple[list[list[Task]], list[Task]]:
    """Returns the tasks of each stream through all loops, and those that belong to no stream."""
    streams: list[list[Task]] = [[] for _ in range(context.step.layout.microbatches)]
    unstreamed: list[Task] = []
    for times, stream, layer in _by_loop(loops, context):
        (unstreamed if stream is None else streams[stream]).extend(layer * times)
    return streams, unstreamed


def busy_us(loops: Sequence[Loop], context: CostContext) -> dict[str, float]:
    """Returns for each engine the microseconds that tasks on this engine alone take in a step."""
    sums = dict.fromkeys(CORES, 0.0)
    for times, _, layer in _by_loop(loops, context):
        for task in layer:
            if len(task.resources) == 1:
                sums[task.resources[0]] = sums.get(task.resources[0], 0.0) + times * task.us
    return sums


def _by_loop(loops: Sequence[Loop], context: CostContext) -> Iterator[tuple[int, int | None, list[Task]]]:
    """Yields for each loop and stream the number of layers, the stream, and the tasks of one layer."""
    for loop in sorted(loops, key=_order):
        for stream, operators in loop.streams.items():
            streamed = stream is not None
            layer = [task for operator in operators for task in tasks(operator, context, streamed)]
            if any(operator.stage in ATTENTION for operator in operators):
                layer = [*_norms(context, streamed), *layer]
            yield loop.times, stream, layer


def _order(loop: Loop) -> tuple[bool, bool]:
    """Sort key of a loop: dense layers, then MoE layers, then the head."""
    stages = {operator.stage for operators in loop.streams.values() for operator in operators}
    return "LMHead" in stages, "Gate" in stages


def _norms(context: CostContext, streamed: bool) -> list[Task]:
    """Returns the two norms of a layer: each adds to the residual, normalises, and rounds its result.

    On the Ascend the first one is fused into MLAProlog (section 4.2.2) and has no launch of its own.
    """
    machine, step = context.machine, context.step
    engines, share = context.engines("Norm", streamed)
    norm = cost.vector(machine, step.stream_tokens * step.c.hidden_size * (2 + 2 + 2 + 1), share)
    fused = machine["vector_launch_us"] if machine.kind == "ascend" else 0.0
    return [Task("Norm", engines, us, norm.bound, norm.memory) for us in (norm.us - fused, norm.us)]


def tasks(operator: Operator, context: CostContext, streamed: bool) -> list[Task]:
    """Returns the kernels of one execution of an operator."""
    stage, machine = operator.stage, context.machine
    engines, share = context.engines(stage, streamed)
    if stage in ("Dispatch", "Combine"):
        return _exchange(stage, context, engines, share, streamed)
    kernels: list[cost.Cost] = []
    if stage == "FusedAttention":
        kernel = "prefill_tflops" if context.step.kind == "prefill" else "attention_tflops"
        kernels.append(cost.attention(machine, *attention_work(operator, context.step), share, kernel))
    elif stage == "MLP":
        kernels += _experts(operator, context, share)
    else:
        for i, p in enumerate(operator.products):
            launch = not i or stage not in FUSED or machine.kind == "gpu"
            kernels.append(cost.matmul(machine, p.dtype, p.shape, p.bytes, share, launch))
        kernels += [cost.vector(machine, moved, share) for moved in _vector_bytes(operator, context)]
    kernels += [cost.collective(machine, x.wire_bytes) for x in operator.collectives]
    return [Task(stage, engines, kernel.us, kernel.bound, kernel.memory) for kernel in kernels]


def _vector_bytes(operator: Operator, context: CostContext) -> Iterable[float]:
    """Yields the bytes that each vector operator of a stage moves.

    Vector operators round, activate, choose experts and sample tokens. On GPUs they also put together a
    prompt's keys, which the Ascend fuses with attention (section 4.2.2).
    """
    step, machine = context.step, context.machine
    first, last = operator.products[0] if operator.products else None, operator.products[-1:]
    if first and operator.stage == "O_proj":  # its input is rounded
        yield 3.0 * first.shape[0] * first.shape[1] * first.shape[2]
    elif last and operator.stage in ("DenseFFN", "SharedExpert"):
        yield (4.0 + 1.0) * last[0].shape[1] * last[0].shape[2]
    elif operator.stage == "Gate":
        yield 4.0 * step.stream_tokens * step.c.n_routed_experts
    elif operator.stage == "KeysAndValues" and machine.kind == "gpu" and step.kind == "prefill":
        a = step.c.attention
        if isinstance(a, MLAConfig):  # keys: a part read, all written; queries: the rotated part, both ways
            per_head = a.qk_nope_head_dim + a.qk_head_dim + 2 * a.qk_rope_head_dim
            yield 2.0 * step.stream_tokens * step.c.num_attention_heads * per_head
    elif operator.stage == "LMHead":
        for p in operator.products:
            yield 2 * 4.0 * p.shape[1] * p.shape[3]
            if machine.kind == "ascend" and "MTP" not in p.scope.split("/"):  # drafts are greedy
                yield from _sorted_bytes(machine, p.shape[1], p.shape[3])


def _sorted_bytes(machine: MachineModel, rows: float, vocab: int) -> Iterable[float]:
    """Yields the bytes that sampling moves to sort logits (section 4.2.4: sort, cumulative sum, filter).

    A logit and its token are 8 bytes. Runs of 32 are sorted first and then merged; each pass reads and writes
    all.
    """
    merges = math.ceil(math.log(vocab / 32, machine["sort_width"]))
    yield 2 * 8.0 * rows * vocab * (1 + merges)


def _experts(operator: Operator, context: CostContext, share: cost.Share) -> list[cost.Cost]:
    """Returns the busiest rank's experts as grouped products over the rows that it received.

    DeepEP's kernels for many tokens leave rows in the order of arrival; Ascend's dispatch and combine place
    them by expert (section 4.2.1).
    """
    step, machine = context.step, context.machine
    groups, rows = step.layout.slots_per_rank, context.imbalance * step.stream_tokens * context.copies
    kernels = []
    for p in operator.products:
        k, n = p.shape[2:]
        item = 1 if p.dtype == "int8" else 2
        moved = groups * k * n * item + rows * (k * item + 2 * n)
        kernels.append(cost.matmul(machine, p.dtype, (groups, rows / groups, k, n), moved, share))
    kernels.append(cost.vector(machine, rows * step.c.moe_intermediate_size * (2 * 2 + 1), share))
    if machine.kind == "gpu" and step.kind == "prefill":  # grouped products take rows ordered by expert
        kernels.append(cost.vector(machine, rows * step.c.hidden_size * (1 + 1), share))
        kernels.append(cost.vector(machine, rows * step.c.hidden_size * (2 + 2), share))
    return kernels


def _exchange(
    stage: str,
    context: CostContext,
    engines: tuple[str, ...],
    share: cost.Share,
    streamed: bool,
) -> list[Task]:
    """Returns the tasks of the busiest rank's dispatch or combine."""
    step, machine = context.step, context.machine
    c, layout = step.c, step.layout
    phase: cost.ExchangePhase = "dispatch" if stage == "Dispatch" else "combine"
    narrow = stage == "Dispatch" and layout.wire == "int8"
    size = c.hidden_size + machine["dispatch_bytes"] if narrow else 2 * c.hidden_size
    tokens = context.imbalance * step.stream_tokens
    if machine.kind == "gpu" and step.kind == "prefill":
        reached = nodes_reached(c, layout.expert_ranks, machine)
        exchange = cost.exchange_by_node(machine, phase, tokens, size, reached)
    else:
        messages = tokens * context.copies
        exchange = cost.exchange(machine, phase, messages, size, layout.expert_ranks, share.cores)
    if machine.kind == "ascend" and step.kind == "prefill" and streamed and layout.microbatches > 1:
        transfer = Task(stage, ("SDMA",), exchange.start + exchange.wire, "network", exchange.memory)
        compute = Task(f"{stage}Compute", ("vector cores",), exchange.cores, "vector cores")
        return [compute, transfer] if stage == "Dispatch" else [transfer, compute]
    parts = {"launch": exchange.start, "network": exchange.wire, "vector cores": exchange.cores}
    bound = max(parts, key=lambda part: parts[part])
    return [Task(stage, engines, exchange.us, bound, exchange.memory)]


def nodes_reached(c: ModelConfig, ranks: int, machine: MachineModel) -> float:
    """Returns the mean number of nodes on which a token's experts lie, possibly including the token's own.

    All nodes are equally likely. A router that keeps to `topk_group` of `n_group` groups reaches a node if
    one of the node's groups is among them.
    """
    nodes = ranks / machine.ranks_per_node
    if nodes <= 1:
        return 1.0
    if nodes > c.n_group:  # experts of one group on several nodes
        return nodes * (1 - (1 - 1 / nodes) ** c.num_experts_per_tok)
    per_node = round(c.n_group / nodes)
    return nodes * (1 - math.comb(c.n_group - per_node, c.topk_group) / math.comb(c.n_group, c.topk_group))
