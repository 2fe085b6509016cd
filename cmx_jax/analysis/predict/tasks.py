"""A step's operators as tasks: on which of a rank's engines each runs, with how much of them, how long.

* *CloudMatrix384, decode* (section 4.2.3): attention runs on some of a die's matrix and vector cores, MoE on
  the others. Layers without MoE, and what belongs to no stream, have the whole die.
* *CloudMatrix384, prefill* (section 4.3.2): matrix cores run attention, shared experts and MLP; vector cores
  what of dispatch and combine is computed, SDMA what of them travels. SP-TP-SP's collectives are part of
  attention: the section names no engine that runs them beside it.
* *GPUs*: dispatch and combine leave the SMs alone in decode (DeepEP's hooks), and hold some in prefill.

One stream has the whole rank, one operator behind the other.
"""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from cmx_jax.analysis.cost import operators as cost
from cmx_jax.analysis.cost.constants import Machine
from cmx_jax.analysis.cost.overlap import Task
from cmx_jax.analysis.predict.operators import ATTENTION, Loop, Operator, Step, attention_work
from cmx_jax.model.config import MLAConfig, ModelConfig
from cmx_jax.model.sharding import shared_in_slots

MOE = ("Gate", "SharedExpert", "Dispatch", "MLP", "Combine")
FUSED = ("MLAProlog", "QKV")  # one kernel on the Ascend, however many products (section 4.2.2)
CORES = ("attention cores", "MoE cores")


@dataclass(frozen=True)
class Setting:
    """Under which a step's operators run.

    Attributes:
      of: the step.
      on: the machine.
      busy: load of the busiest expert rank over the mean.
      attention_share: of a rank's cores, where attention and MoE have their own.
      load: for each engine, the part of memory's time that it takes.
    """

    of: Step
    on: Machine
    busy: float
    attention_share: float = 0.5
    load: Mapping[str, float] = field(default_factory=dict)

    def engines(self, stage: str, streamed: bool) -> tuple[tuple[str, ...], cost.Share]:
        """What an operator occupies, and its share of it."""
        if not streamed or self.of.layout.microbatches == 1:
            return CORES, cost.ALL
        engines: tuple[str, ...] = CORES
        cores = 1.0
        if self.on.kind == "gpu":
            if stage in ("Dispatch", "Combine"):
                engines = ("network",)
            elif self.of.kind == "prefill":
                cores = 1 - self.on["exchange_cores"] / self.on["cores"]
        elif self.of.kind == "decode" and stage in ATTENTION:
            engines, cores = CORES[:1], self.attention_share
        elif self.of.kind == "decode" and stage in MOE:
            engines, cores = CORES[1:], 1 - self.attention_share
        others = sum(part for engine, part in self.load.items() if engine not in engines)
        return engines, cost.Share(cores, max(1 - others, 0.1))

    @property
    def copies(self) -> int:
        """Messages of a token."""
        return self.of.c.num_experts_per_tok + shared_in_slots(self.of.c, self.of.layout)


def chains(loops: Sequence[Loop], at: Setting) -> tuple[list[list[Task]], list[Task]]:
    """Tasks of each stream through all loops, and of what is in no stream."""
    streams: list[list[Task]] = [[] for _ in range(at.of.layout.microbatches)]
    alone: list[Task] = []
    for times, stream, made in _by_loop(loops, at):
        (alone if stream is None else streams[stream]).extend(made * times)
    return streams, alone


def busy_us(loops: Sequence[Loop], at: Setting) -> dict[str, float]:
    """For how long a step's streams need each engine that they do not hold together with others."""
    sums = dict.fromkeys(CORES, 0.0)
    for times, _, made in _by_loop(loops, at):
        for task in made:
            if len(task.resources) == 1:
                sums[task.resources[0]] = sums.get(task.resources[0], 0.0) + times * task.us
    return sums


def _by_loop(loops: Sequence[Loop], at: Setting) -> Iterator[tuple[int, int | None, list[Task]]]:
    """How often, in which stream, what."""
    for loop in sorted(loops, key=_order):
        for stream, operators in loop.streams.items():
            streamed = stream is not None
            made = [task for operator in operators for task in tasks(operator, at, streamed)]
            if any(operator.stage in ATTENTION for operator in operators):
                made = [*_norms(at, streamed), *made]
            yield loop.times, stream, made


def _order(loop: Loop) -> tuple[bool, bool]:
    """Dense layers, MoE layers, what is behind them."""
    stages = {operator.stage for operators in loop.streams.values() for operator in operators}
    return "LMHead" in stages, "Gate" in stages


def _norms(at: Setting, streamed: bool) -> list[Task]:
    """Two of a layer: each adds to the residual, norms, and rounds for what follows. On the Ascend MLAProlog
    has the first one (section 4.2.2), and starts it."""
    engines, share = at.engines("Norm", streamed)
    found = cost.vector(at.on, at.of.stream_tokens * at.of.c.hidden_size * (2 + 2 + 2 + 1), share)
    fused = at.on["vector_launch_us"] if at.on.kind == "ascend" else 0.0
    return [Task("Norm", engines, us, found.bound, found.memory) for us in (found.us - fused, found.us)]


def tasks(operator: Operator, at: Setting, streamed: bool) -> list[Task]:
    """An operator's kernels, once."""
    stage, on = operator.stage, at.on
    engines, share = at.engines(stage, streamed)
    if stage in ("Dispatch", "Combine"):
        return _exchange(stage, at, engines, share, streamed)
    made: list[cost.Cost] = []
    if stage == "FusedAttention":
        kernel = "prefill_tflops" if at.of.kind == "prefill" else "attention_tflops"
        made.append(cost.attention(on, *attention_work(operator, at.of), share, kernel))
    elif stage == "MLP":
        made += _experts(operator, at, share)
    else:
        for i, p in enumerate(operator.products):
            starts = not i or stage not in FUSED or on.kind == "gpu"
            made.append(cost.matmul(on, p.dtype, p.shape, p.bytes, share, starts))
        made += [cost.vector(on, moved, share) for moved in _beside(operator, at)]
    made += [cost.collective(on, x.wire_bytes) for x in operator.collectives]
    return [Task(stage, engines, found.us, found.bound, found.memory) for found in made]


def _beside(operator: Operator, at: Setting) -> Iterable[float]:
    """Bytes that vector operators move beside products: rounding, activation, choice of experts, of tokens;
    on GPUs the keys of a prompt put together (one kernel with attention on the Ascend, section 4.2.2)."""
    of, on = at.of, at.on
    first, last = operator.products[0] if operator.products else None, operator.products[-1:]
    if first and operator.stage == "O_proj":  # its input is rounded
        yield 3.0 * first.shape[0] * first.shape[1] * first.shape[2]
    elif last and operator.stage in ("DenseFFN", "SharedExpert"):
        yield (4.0 + 1.0) * last[0].shape[1] * last[0].shape[2]
    elif operator.stage == "Gate":
        yield 4.0 * of.stream_tokens * of.c.n_routed_experts
    elif operator.stage == "KeysAndValues" and on.kind == "gpu" and of.kind == "prefill":
        a = of.c.attention
        if isinstance(a, MLAConfig):  # keys: a part read, all written; queries: the rotated part, both ways
            each = a.qk_nope_head_dim + a.qk_head_dim + 2 * a.qk_rope_head_dim
            yield 2.0 * of.stream_tokens * of.c.num_attention_heads * each
    elif operator.stage == "LMHead":
        for p in operator.products:
            yield 2 * 4.0 * p.shape[1] * p.shape[3]
            if on.kind == "ascend" and "MTP" not in p.scope.split("/"):  # drafts are greedy
                yield from _sorted_bytes(on, p.shape[1], p.shape[3])


def _sorted_bytes(on: Machine, rows: float, vocab: int) -> Iterable[float]:
    """Sampling's sort of logits and their tokens, 8 bytes each (section 4.2.4: sort, cumulative sum, filter):
    runs of 32, then merges, each of which reads and writes all."""
    merges = math.ceil(math.log(vocab / 32, on["sort_width"]))
    yield 2 * 8.0 * rows * vocab * (1 + merges)


def _experts(operator: Operator, at: Setting, share: cost.Share) -> list[cost.Cost]:
    """The busiest rank's experts as grouped products over the rows that there are. DeepEP's kernels for many
    tokens leave these as they came; Ascend's dispatch and combine place them themselves (section 4.2.1)."""
    groups, rows = at.of.layout.slots_per_rank, at.busy * at.of.stream_tokens * at.copies
    made = []
    for p in operator.products:
        k, n = p.shape[2:]
        item = 1 if p.dtype == "int8" else 2
        moved = groups * k * n * item + rows * (k * item + 2 * n)
        made.append(cost.matmul(at.on, p.dtype, (groups, rows / groups, k, n), moved, share))
    made.append(cost.vector(at.on, rows * at.of.c.moe_intermediate_size * (2 * 2 + 1), share))
    if at.on.kind == "gpu" and at.of.kind == "prefill":  # grouped products take their rows in expert's order
        made.append(cost.vector(at.on, rows * at.of.c.hidden_size * (1 + 1), share))
        made.append(cost.vector(at.on, rows * at.of.c.hidden_size * (2 + 2), share))
    return made


def _exchange(
    stage: str,
    at: Setting,
    engines: tuple[str, ...],
    share: cost.Share,
    streamed: bool,
) -> list[Task]:
    """Dispatch or combine of the busiest rank."""
    c, layout, on, of = at.of.c, at.of.layout, at.on, at.of
    which: Literal["dispatch", "combine"] = "dispatch" if stage == "Dispatch" else "combine"
    narrow = stage == "Dispatch" and layout.wire == "int8"
    size = c.hidden_size + on["dispatch_bytes"] if narrow else 2 * c.hidden_size
    tokens = at.busy * of.stream_tokens
    if on.kind == "gpu" and of.kind == "prefill":
        found = cost.exchange_by_node(on, which, tokens, size, nodes_reached(c, layout.expert_ranks, on))
    else:
        found = cost.exchange(on, which, tokens * at.copies, size, layout.expert_ranks, share.cores)
    if on.kind == "ascend" and of.kind == "prefill" and streamed and layout.microbatches > 1:
        travels = Task(stage, ("SDMA",), found.start + found.wire, "network", found.memory)
        computes = Task(f"{stage}Compute", ("vector cores",), found.cores, "vector cores")
        return [computes, travels] if stage == "Dispatch" else [travels, computes]
    parts = {"launch": found.start, "network": found.wire, "vector cores": found.cores}
    return [Task(stage, engines, found.us, max(parts, key=lambda part: parts[part]), found.memory)]


def nodes_reached(c: ModelConfig, ranks: int, on: Machine) -> float:
    """Nodes that a token's experts lie on, its own perhaps among them, each as likely as any other.

    A router that keeps to `topk_group` of `n_group` groups reaches a node if one of its groups is among them.
    """
    nodes = ranks / on.ranks_per_node
    if nodes <= 1:
        return 1.0
    if nodes > c.n_group:  # experts of one group on several nodes
        return nodes * (1 - (1 - 1 / nodes) ** c.num_experts_per_tok)
    held = round(c.n_group / nodes)
    return nodes * (1 - math.comb(c.n_group - held, c.topk_group) / math.comb(c.n_group, c.topk_group))
