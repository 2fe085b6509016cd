"""What a step would cost on a machine, from the program that would run.

The step is traced at full size (`operators.py`), its operators become tasks with a time and a place on the
machine (`tasks.py`), and the streams are laid side by side (`analysis/cost/overlap.py`).
"""

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from cmx_jax.analysis.cost.constants import Machine, machine
from cmx_jax.analysis.cost.imbalance import busiest, power_law
from cmx_jax.analysis.cost.overlap import Task, critical_path
from cmx_jax.analysis.predict.fits import check_fits
from cmx_jax.analysis.predict.operators import Loop, Step, loops, traced
from cmx_jax.analysis.predict.roofline import roofline
from cmx_jax.analysis.predict.tasks import CORES, Setting, busy_us, chains
from cmx_jax.errors import CmxError
from cmx_jax.mesh.layout import Layout
from cmx_jax.mesh.trace.ops.contents import Contents
from cmx_jax.model.config import ModelConfig
from cmx_jax.model.sharding import shared_in_slots
from cmx_jax.model.weights import int8_fields


def predict(
    c: ModelConfig,
    hardware: str | Machine,
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
) -> dict[str, Any]:
    """Time of a step, and what follows from it.

    Args:
      c: the model.
      hardware: a name in `cmx_jax.analysis.cost.constants.MACHINES`, or such a machine with constants moved.
      layout: how the model lies on its ranks.
      step: `decode`, or `prefill` of whole prompts.
      batch: sequences of an NPU (or GPU).
      context: tokens that each sequence attends over (decode), or of each prompt.
      drafts: MTP drafts that a decode step verifies; in prefill whether the MTP layer runs.
      mtp_acceptance: how likely a draft is right, if all before it were.
      attention_cores: that the attention stream of a decode step has, of a CloudMatrix384 die's 24; None:
        what balances the streams. It matters with microbatches only.
      imbalance: load of the busiest expert rank over the mean; None: what `cost/imbalance.py` expects of
        `load` or `exponent`, and `eplb`.
      load: how often each routed expert was chosen, [layers, E]; None: `exponent` has it.
      exponent: power law of the experts' popularity; 0: all alike.
      eplb: whether experts are placed by it.
      weights: `int8` for the matrices that may be (FP8 where a machine has that: as many bytes), or
        `bfloat16`.

    Returns:
      `step_ms`; `tokens_per_s` of an NPU; `tpot_ms` (decode); `bound`; `attention_cores` and `stream_us`
      where streams have cores of their own; `breakdown`: rows of `operator`, `ms`, which add up to the step,
      with `busy_ms` of both hidden and seen; `roofline`; `flops`, `wire_bytes` as traced.

    Raises:
      CmxError: there is no such hardware, batch, context, acceptance or imbalance, or it does not fit.
    """
    on = machine(hardware) if isinstance(hardware, str) else hardware
    of = _step(c, on, layout, step, batch, context, drafts, weights)
    if not 0 <= mtp_acceptance <= 1:
        raise CmxError(f"mtp_acceptance is {mtp_acceptance}, expected 0 to 1")
    if imbalance is not None and not 1 <= imbalance <= layout.expert_ranks:
        raise CmxError(
            f"imbalance is {imbalance}, expected 1 (even) to the {layout.expert_ranks} expert ranks"
        )
    memory = check_fits(of, on, batch)
    found, parts = traced(of), loops(of)
    busy = _busy(of, load, exponent, eplb) if imbalance is None else imbalance
    setting = Setting(of, on, busy)
    path, every, setting = _run(parts, setting, attention_cores)
    us, made = sum(task.us for task in path), _tokens(of, drafts, mtp_acceptance)
    split = bool(setting.load) and step == "decode"
    return {
        "hardware": on.name,
        "step": step,
        "batch": batch,
        "context": context,
        "drafts": drafts,
        "microbatches": layout.microbatches,
        "imbalance": busy,
        "step_ms": us / 1e3,
        "tokens_per_s": batch * made / us * 1e6,
        "tpot_ms": us / 1e3 / made if step == "decode" else None,
        "bound": max(_sums(path, "bound").items(), key=lambda item: item[1])[0],
        "attention_cores": round(setting.attention_share * on["cores"]) if split else None,
        "stream_us": _stream_us(parts, setting) if split else None,
        "breakdown": _breakdown(path, every),
        "roofline": roofline(of, on),
        "memory_gb": memory,
        "flops": _flops(found, of),
        "wire_bytes": sum(x.known * x.wire_bytes for x in found.collectives),
    }


def _step(
    c: ModelConfig,
    on: Machine,
    layout: Layout,
    step: str,
    batch: int,
    context: int,
    drafts: int,
    weights: str,
) -> Step:
    if step not in ("decode", "prefill"):
        raise CmxError(f"step is {step!r}, expected decode or prefill")
    if weights not in ("int8", "bfloat16"):
        raise CmxError(f"weights are {weights!r}, expected int8 or bfloat16")
    parts, ranks = layout.microbatches, on.ranks_per_npu
    sequences, rest = divmod(batch * layout.sequence_ranks, ranks)
    if batch < 1 or rest or sequences % parts:
        each = ranks * parts if layout.sequence_ranks % ranks else parts
        raise CmxError(
            f"batch is {batch}, expected a positive multiple of {each}: "
            f"{ranks} ranks an NPU, {parts} microbatches"
        )
    if not 1 <= context <= c.max_position_embeddings:
        raise CmxError(f"context is {context}, expected 1 to the model's {c.max_position_embeddings}")
    if step == "prefill" and context % layout.sequence_ranks:
        raise CmxError(
            f"context is {context}, expected a multiple of the {layout.sequence_ranks} ranks that share it"
        )
    if drafts < 0 or (drafts and not c.num_nextn_predict_layers):
        most = "0: the model has no MTP layer" if not c.num_nextn_predict_layers else "0 or more"
        raise CmxError(f"drafts is {drafts}, expected {most}")
    if weights == "int8":
        c = replace(c, int8=int8_fields(c, drafts > 0))
    return Step(c, layout, step, sequences, context, drafts)


def _tokens(of: Step, drafts: int, acceptance: float) -> float:
    """That a sequence gets by one step (decode), or brings into it."""
    if of.kind == "prefill":
        return float(of.context)
    return sum(acceptance**i for i in range(drafts + 1))


def _busy(of: Step, load: np.ndarray | None, exponent: float, eplb: bool) -> float:
    """Load of the busiest rank over the mean; the mean over layers, where each has its own."""
    c, layout = of.c, of.layout
    if not c.n_routed_experts:
        return 1.0
    popular = power_law(c.n_routed_experts, exponent)[None] if load is None else np.asarray(load, np.float64)
    if popular.ndim != 2 or popular.shape[1] != c.n_routed_experts or not (popular.sum(axis=1) > 0).all():
        raise CmxError(f"load of shape {popular.shape}, expected [layers, {c.n_routed_experts}] counts")
    popular = popular / popular.sum(axis=1, keepdims=True)
    given = c.num_experts_per_tok, shared_in_slots(c, layout), max(round(of.stream_tokens), 1), eplb
    return float(np.mean([busiest(layout, tuple(layer), *given) for layer in popular.tolist()]))


def _run(
    parts: Sequence[Loop], at: Setting, attention_cores: int | None
) -> tuple[list[Task], list[Task], Setting]:
    """The critical path, all tasks, and the setting in which they run.

    Where streams have cores of their own these are split as told, or so that neither stream waits for the
    other more than it must (section 4.2.3: the split follows the length of the cache). Then what each engine
    takes of memory's time is taken from the others.
    """
    streams, alone = chains(parts, at)
    if len(streams) > 1 and at.on.kind == "ascend":
        if at.of.kind == "decode":
            at = _split(parts, at, attention_cores)
            streams, alone = chains(parts, at)
        us = sum(task.us for task in critical_path(streams))
        load: dict[str, float] = {}
        for task in (task for stream in streams for task in stream if task.resources != CORES):
            for engine in task.resources:
                load[engine] = load.get(engine, 0.0) + task.memory / us
        at = replace(at, load=load)
        streams, alone = chains(parts, at)
    return [*critical_path(streams), *alone], [task for tasks in (*streams, alone) for task in tasks], at


def _split(parts: Sequence[Loop], at: Setting, attention_cores: int | None) -> Setting:
    cores = round(at.on["cores"])
    if attention_cores is not None:
        if not 1 <= attention_cores < cores:
            raise CmxError(f"attention_cores is {attention_cores}, expected 1 to {cores - 1}")
        return replace(at, attention_share=attention_cores / cores)

    def longest(share: float) -> float:
        return max(busy_us(parts, replace(at, attention_share=share)).values())

    return replace(at, attention_share=min((i / cores for i in range(1, cores)), key=longest))


def _sums(tasks: Iterable[Task], by: str) -> dict[str, float]:
    sums: dict[str, float] = {}
    for task in tasks:
        sums[getattr(task, by)] = sums.get(getattr(task, by), 0.0) + task.us
    return sums


def _stream_us(parts: Sequence[Loop], at: Setting) -> dict[str, float]:
    """What one microbatch needs of each stream's cores in one layer (section 4.2.3)."""
    layers = (at.of.c.num_hidden_layers, at.of.c.num_moe_layers)
    busy = busy_us(parts, at)
    parts_of = at.of.layout.microbatches
    return {name: busy[name] / parts_of / max(n, 1) for name, n in zip(CORES, layers, strict=True)}


def _breakdown(path: list[Task], every: list[Task]) -> list[dict[str, Any]]:
    """Operators by the time for which the step waits for them; these add up to it."""
    seen, busy = _sums(path, "name"), _sums(every, "name")
    rows = [
        {"operator": name, "ms": seen.get(name, 0.0) / 1e3, "busy_ms": us / 1e3} for name, us in busy.items()
    ]
    return sorted(rows, key=lambda row: -row["ms"])


def _flops(found: Contents, of: Step) -> dict[str, int]:
    """Operations by type as `cmx trace` counts them."""
    flops: dict[str, int] = {}
    copies = of.c.num_experts_per_tok + shared_in_slots(of.c, of.layout)
    for p in found.products:
        each = p.flops
        if "MLP" in p.scope.split("/"):
            each = int(2 * of.stream_tokens * copies * p.shape[2] * p.shape[3])
        flops[p.dtype] = flops.get(p.dtype, 0) + p.known * each
    return flops


def sensitivity(
    c: ModelConfig, hardware: str, layout: Layout, step: str, *, by: float = 0.1, **given: Any
) -> list[dict[str, Any]]:
    """The step's time with each constant, one at a time, `by` larger: rows of `constant`, `value`, `unit`,
    `source`, `step_ms` and `change` (of the time, as a fraction), the most telling first."""
    on = machine(hardware)
    before = predict(c, on, layout, step, **given)["step_ms"]
    rows = []
    for name, constant in on.constants.items():
        if name == "hbm_gb":  # whether it fits, not how long it takes
            continue
        after = predict(c, on.moving(name, 1 + by), layout, step, **given)["step_ms"]
        about = {"constant": name, "value": constant.value, "unit": constant.unit, "source": constant.source}
        rows.append({**about, "step_ms": after, "change": after / before - 1})
    return sorted(rows, key=lambda row: -abs(row["change"]))


def render(found: dict[str, Any]) -> str:
    """A prediction for people."""
    head = [
        f"{found['step']} on {found['hardware']}: {found['batch']} sequences an NPU, "
        f"{found['context']} tokens each, microbatches: {found['microbatches']}",
        f"step {found['step_ms']:.2f} ms, {found['tokens_per_s']:,.0f} tokens/s an NPU"
        + (f", {found['tpot_ms']:.2f} ms a token" if found["tpot_ms"] else "")
        + f"; bound by {found['bound']}",
    ]
    r = found["roofline"]
    head.append(
        f"roofline {r['step_ms']:.2f} ms ({r['bound']}); "
        f"busiest expert rank {found['imbalance']:.2f} x the mean"
    )
    rows = [f"{row['operator']:16}{row['ms']:10.3f}{row['busy_ms']:12.3f}" for row in found["breakdown"]]
    return "\n".join([*head, f"{'operator':16}{'ms':>10}{'busy ms':>12}", *rows])
