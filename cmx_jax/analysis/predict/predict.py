"""Time of a step on a machine, predicted from the program that would run there.

The step is traced at full size (`operators.py`), its operators become tasks with a duration and a place on
the machine (`tasks.py`), and the streams are scheduled in parallel (`analysis/cost/overlap.py`).
"""

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from cmx_jax.analysis.cost import constants
from cmx_jax.analysis.cost.constants import MachineModel
from cmx_jax.analysis.cost.imbalance import busiest, power_law
from cmx_jax.analysis.cost.overlap import Task, critical_path
from cmx_jax.analysis.predict.operators import Loop, Step, loops, trace
from cmx_jax.analysis.predict.prediction import OperatorTime, Prediction, Sensitivity
from cmx_jax.analysis.predict.roofline import memory_of, roofline
from cmx_jax.analysis.predict.tasks import CORES, CostContext, busy_us, chains
from cmx_jax.errors import CmxError
from cmx_jax.mesh.layout import Layout
from cmx_jax.mesh.trace.ops.contents import Contents
from cmx_jax.model.config import ModelConfig
from cmx_jax.model.sharding import shared_in_slots
from cmx_jax.model.weights import int8_fields


def predict(
    c: ModelConfig,
    hardware: str | MachineModel,
    layout: Layout,
    step: str,
    *,
    batch: int,
    context: int,
    drafts: int = 0,
    mtp_acceptance: float = 0.7,
    attention_cores: int | None = None,
    imbalance: float | None = None,
    load: np.ndarray | None = None,
    exponent: float = 0.0,
    eplb: bool = True,
    weights: str = "int8",
) -> Prediction:
    """Predicts the time of a step.

    Args:
      c: Configuration of the model.
      hardware: Name from `cmx_jax.analysis.cost.constants.MACHINES`, or a machine with changed constants.
      layout: Layout of the model on its ranks.
      step: Either `decode`, or `prefill` of whole prompts.
      batch: Number of sequences per NPU (or GPU).
      context: Number of tokens that each sequence attends over (decode), or of each prompt.
      drafts: Number of MTP drafts that a decode step verifies; in prefill, nonzero if the MTP layer runs.
      mtp_acceptance: Probability that a draft is right if all drafts before it were.
      attention_cores: Number of a CloudMatrix384 die's 24 cores for the attention stream of a decode step;
        None balances the streams. It matters with microbatches only.
      imbalance: Load of the busiest expert rank relative to the mean; None derives it from `load` or
        `exponent`, and `eplb` (`cost/imbalance.py`).
      load: Number of times that each routed expert was chosen, [layers, E]; None uses `exponent`.
      exponent: Power-law exponent of the experts' popularity; 0 makes all equally popular.
      eplb: Place experts by their popularity.
      weights: Type of the matrices that may be quantised: `int8` (FP8 on a machine that has it, which has as
        many bytes), or `bfloat16`.

    Raises:
      DoesNotFit: The step needs more memory than a rank has.
      CmxError: The hardware, batch, context, acceptance or imbalance is not valid.
    """
    machine = constants.machine(hardware) if isinstance(hardware, str) else hardware
    sizes = _step(c, machine, layout, step, batch, context, drafts, weights)
    if not 0 <= mtp_acceptance <= 1:
        raise CmxError(f"mtp_acceptance is {mtp_acceptance}, expected 0 to 1")
    if imbalance is not None and not 1 <= imbalance <= layout.expert_ranks:
        raise CmxError(
            f"imbalance is {imbalance}, expected 1 (even) to the {layout.expert_ranks} expert ranks"
        )
    memory, contents, parts = memory_of(sizes, machine, batch), trace(sizes), loops(sizes)
    if imbalance is None:
        imbalance = _imbalance(sizes, load, exponent, eplb)
    path, tasks, cost = _run(parts, CostContext(sizes, machine, imbalance), attention_cores)
    us, tokens = sum(task.us for task in path), _tokens(sizes, drafts, mtp_acceptance)
    split = bool(cost.memory_load) and step == "decode"
    return Prediction(
        hardware=machine.name,
        step=step,
        batch=batch,
        context=context,
        drafts=drafts,
        microbatches=layout.microbatches,
        imbalance=imbalance,
        step_ms=us / 1e3,
        tokens_per_s=batch * tokens / us * 1e6,
        tpot_ms=us / 1e3 / tokens if step == "decode" else None,
        bound=max(_sums(path, "bound").items(), key=lambda item: item[1])[0],
        attention_cores=round(cost.attention_share * machine["cores"]) if split else None,
        stream_us=_stream_us(parts, cost) if split else None,
        breakdown=_breakdown(path, tasks),
        roofline=roofline(sizes, machine),
        memory_gb=memory,
        flops=_flops(contents, sizes),
        wire_bytes=sum(x.known * x.wire_bytes for x in contents.collectives),
    )


def _step(
    c: ModelConfig,
    machine: MachineModel,
    layout: Layout,
    step: str,
    batch: int,
    context: int,
    drafts: int,
    weights: str,
) -> Step:
    """Returns the sizes of a step on one rank, after checking them; see `predict`."""
    if step not in ("decode", "prefill"):
        raise CmxError(f"step is {step!r}, expected decode or prefill")
    if weights not in ("int8", "bfloat16"):
        raise CmxError(f"weights are {weights!r}, expected int8 or bfloat16")
    parts, ranks = layout.microbatches, machine.ranks_per_npu
    sequences, remainder = divmod(batch * layout.sequence_ranks, ranks)
    if batch < 1 or remainder or sequences % parts:
        multiple = ranks * parts if layout.sequence_ranks % ranks else parts
        raise CmxError(
            f"batch is {batch}, expected a positive multiple of {multiple}: "
            f"{ranks} ranks an NPU, {parts} microbatches"
        )
    if not 1 <= context <= c.max_position_embeddings:
        raise CmxError(f"context is {context}, expected 1 to the model's {c.max_position_embeddings}")
    if step == "prefill" and context % layout.sequence_ranks:
        raise CmxError(
            f"context is {context}, expected a multiple of the {layout.sequence_ranks} ranks that share it"
        )
    if drafts < 0 or (drafts and not c.num_nextn_predict_layers):
        expected = "0: the model has no MTP layer" if not c.num_nextn_predict_layers else "0 or more"
        raise CmxError(f"drafts is {drafts}, expected {expected}")
    if weights == "int8":
        c = replace(c, int8=int8_fields(c, drafts > 0))
    return Step(c, layout, step, sequences, context, drafts)


def _tokens(step: Step, drafts: int, acceptance: float) -> float:
    """Returns the mean number of tokens per sequence and step: generated (decode) or consumed (prefill)."""
    if step.kind == "prefill":
        return float(step.context)
    return sum(acceptance**i for i in range(drafts + 1))


def _imbalance(step: Step, load: np.ndarray | None, exponent: float, eplb: bool) -> float:
    """Returns the load of the busiest rank relative to the mean, averaged over the layers of `load`."""
    c, layout = step.c, step.layout
    if not c.n_routed_experts:
        return 1.0
    counts = power_law(c.n_routed_experts, exponent)[None] if load is None else np.asarray(load, np.float64)
    if counts.ndim != 2 or counts.shape[1] != c.n_routed_experts or not (counts.sum(axis=1) > 0).all():
        raise CmxError(f"load of shape {counts.shape}, expected [layers, {c.n_routed_experts}] counts")
    popularity = counts / counts.sum(axis=1, keepdims=True)
    shared, tokens = shared_in_slots(c, layout), max(round(step.stream_tokens), 1)
    layers = [
        busiest(layout, tuple(layer), c.num_experts_per_tok, shared, tokens, eplb)
        for layer in popularity.tolist()
    ]
    return float(np.mean(layers))


def _run(
    parts: Sequence[Loop], context: CostContext, attention_cores: int | None
) -> tuple[list[Task], list[Task], CostContext]:
    """Returns the critical path, all tasks, and the context in which they run.

    If streams have cores of their own, these are split by `attention_cores`, or so that the streams take
    equally long (section 4.2.3: the split follows the length of the cache). Then the memory time of each
    engine is subtracted from that of the others.
    """
    streams, unstreamed = chains(parts, context)
    if len(streams) > 1 and context.machine.kind == "ascend":
        if context.step.kind == "decode":
            context = _split_cores(parts, context, attention_cores)
            streams, unstreamed = chains(parts, context)
        us = sum(task.us for task in critical_path(streams))
        load: dict[str, float] = {}
        for task in (task for stream in streams for task in stream if task.resources != CORES):
            for engine in task.resources:
                load[engine] = load.get(engine, 0.0) + task.memory / us
        context = replace(context, memory_load=load)
        streams, unstreamed = chains(parts, context)
    path = [*critical_path(streams), *unstreamed]
    return path, [task for tasks in (*streams, unstreamed) for task in tasks], context


def _split_cores(parts: Sequence[Loop], context: CostContext, attention_cores: int | None) -> CostContext:
    """Returns the context with `attention_cores`, or with the split that minimises the longer stream."""
    cores = round(context.machine["cores"])
    if attention_cores is not None:
        if not 1 <= attention_cores < cores:
            raise CmxError(f"attention_cores is {attention_cores}, expected 1 to {cores - 1}")
        return replace(context, attention_share=attention_cores / cores)

    def longest(share: float) -> float:
        return max(busy_us(parts, replace(context, attention_share=share)).values())

    return replace(context, attention_share=min((i / cores for i in range(1, cores)), key=longest))


def _sums(tasks: Iterable[Task], by: str) -> dict[str, float]:
    """Returns the microseconds of tasks, summed by an attribute."""
    sums: dict[str, float] = {}
    for task in tasks:
        sums[getattr(task, by)] = sums.get(getattr(task, by), 0.0) + task.us
    return sums


def _stream_us(parts: Sequence[Loop], context: CostContext) -> dict[str, float]:
    """Returns the time that one microbatch needs each stream's cores in one layer (section 4.2.3)."""
    layers = (context.step.c.num_hidden_layers, context.step.c.num_moe_layers)
    busy = busy_us(parts, context)
    microbatches = context.step.layout.microbatches
    return {name: busy[name] / microbatches / max(n, 1) for name, n in zip(CORES, layers, strict=True)}


def _breakdown(path: list[Task], tasks: list[Task]) -> tuple[OperatorTime, ...]:
    """Returns the operators of all tasks, those that the step waits for longest first."""
    exposed, busy = _sums(path, "name"), _sums(tasks, "name")
    rows = [OperatorTime(name, exposed.get(name, 0.0) / 1e3, us / 1e3) for name, us in busy.items()]
    return tuple(sorted(rows, key=lambda row: -row.ms))


def _flops(contents: Contents, step: Step) -> dict[str, int]:
    """Returns the operations by type, as `cmx trace` counts them."""
    flops: dict[str, int] = {}
    copies = step.c.num_experts_per_tok + shared_in_slots(step.c, step.layout)
    for p in contents.products:
        operations = p.flops
        if "MLP" in p.scope.split("/"):
            operations = int(2 * step.stream_tokens * copies * p.shape[2] * p.shape[3])
        flops[p.dtype] = flops.get(p.dtype, 0) + p.known * operations
    return flops


def sensitivity(
    c: ModelConfig, hardware: str, layout: Layout, step: str, *, by: float = 0.1, **arguments: Any
) -> list[Sensitivity]:
    """Predicts a step once for each constant, with that constant increased; the largest change comes first.

    Args:
      c: Configuration of the model.
      hardware: Name from `cmx_jax.analysis.cost.constants.MACHINES`.
      layout: Layout of the model on its ranks.
      step: Either `decode` or `prefill`.
      by: Relative increase of the constant.
      **arguments: Further arguments of `predict`.
    """
    machine = constants.machine(hardware)
    before = predict(c, machine, layout, step, **arguments).step_ms
    rows = []
    for name, constant in machine.constants.items():
        if name == "hbm_gb":  # decides whether a step fits, not how long it takes
            continue
        after = predict(c, machine.scaled(name, 1 + by), layout, step, **arguments).step_ms
        change = after / before - 1
        rows.append(Sensitivity(name, constant.value, constant.unit, constant.source, after, change))
    return sorted(rows, key=lambda row: -abs(row.change))
