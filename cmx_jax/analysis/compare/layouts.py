"""`compare`: one step of a model under several layouts, as one JSON document."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from cmx_jax.analysis.compare.measure import Measure
from cmx_jax.analysis.cost.constants import MACHINES
from cmx_jax.analysis.predict.predict import predict
from cmx_jax.analysis.trace.memory import by_layout
from cmx_jax.analysis.trace.model import trace_model
from cmx_jax.errors import CmxError
from cmx_jax.mesh.host import MAX_COLLECTIVE_CPU_DEVICES, request_devices
from cmx_jax.mesh.layout import Layout
from cmx_jax.mesh.named_layouts import Ready, ready
from cmx_jax.mesh.supernode import CLOUDMATRIX384, H800_NODE
from cmx_jax.mesh.trace.table import Trace
from cmx_jax.mesh.trace.traffic import by_node, traffic
from cmx_jax.model.config import ModelConfig
from cmx_jax.serving.deploy.model import config_of, located

STEPS = ("decode", "prefill")
RUNNERS = ("lanes", "devices")
USUAL_CONTEXT = 4096


def compare(
    model: str,
    layouts: Sequence[str] | Mapping[str, Ready],
    *,
    step: str | None = None,
    batch: int | None = None,
    context: int | None = None,
    num_speculative_tokens: int = 0,
    source: str = "jaxpr",
    target: str = "cpu",
    runner: str = "lanes",
    progress: Callable[[str], None] = lambda _: None,
) -> dict[str, Any]:
    """What a step takes under each layout; with weights at hand, also how long it takes here.

    Args:
      model: a preset, which is traced only; or a directory or `tiny`, which run, too.
      layouts: names that `cmx_jax.mesh.named_layouts.ready` knows, or layouts of your own by name.
      step: `decode` or `prefill`; None: what the first layout is for.
      batch: sequences of an NPU; None: the first layout's.
      context: tokens of a sequence; None: 4,096, or the model's context if that is less.
      num_speculative_tokens: MTP drafts of a decode step.
      source: where collectives and products are read, `jaxpr`, `stablehlo` or `hlo` (of the compiler).
      target: what is compiled for, as of `cmx_jax.mesh.targets.target_devices`.
      runner: what the step runs on here, `lanes` or `devices`.
      progress: told what is being done.

    Returns:
      What was asked, and in `layouts` for each of them `name`, `about`, `machine`, `ranks`,
      `ranks_per_npu`, `sequences` (of all ranks); of one rank in one step `moved` (`payload_bytes` and
      `wire_bytes` by `axes` and `plane`), `flops` by type, `memory` (bytes by what for), `program` (bytes, as
      of `Trace.memory`), `seconds` of tracing and compiling;
      `predicted_ms` on its machine or None; between nodes `node_traffic [N, N]` in bytes,
      rows being senders; `measured` (see `cmx_jax.analysis.compare.measure.Measure`) or None; `notes`.

    Raises:
      CmxError: an unknown model or layout, a layout given twice, a batch or context that does not fit one.
    """
    c, known = config_of(model), _known(layouts)
    first = next(iter(known.values()))
    step = step or first.step
    if step not in STEPS:
        raise CmxError(f"step {step!r}, expected one of {list(STEPS)}")
    if runner not in RUNNERS:
        raise CmxError(f"runner {runner!r}, expected one of {list(RUNNERS)}")
    batch = first.batch if batch is None else batch
    context = min(USUAL_CONTEXT, c.max_position_embeddings) if context is None else context
    given: dict[str, Any] = {"step": step, "batch": batch, "context": context}
    given |= {"drafts": num_speculative_tokens, "source": source, "target": target}
    made = {name: _of(name, found.make, c.n_routed_experts) for name, found in known.items()}
    widest = max(layout.ranks for layout in made.values())
    if source == "hlo" and target == "cpu":  # all of them before JAX starts
        request_devices(widest)
    elif runner == "devices":
        request_devices(min(widest, MAX_COLLECTIVE_CPU_DEVICES))
    rows = []
    for name, layout in made.items():
        progress(f"tracing {name}")
        rows.append({"name": name, **_of(name, _traced, c, layout, known[name], **given)})
    if isinstance(directory := located(model), Path):
        run = Measure(directory, step, context, num_speculative_tokens, runner)
        for row in rows:
            progress(f"running {row['name']}")
            try:
                row["measured"] = run(made[row["name"]], row["sequences"])
            except CmxError as error:
                row["notes"].append(f"not run: {error}")
    return {
        "model": model,
        "step": step,
        "batch": batch,
        "context": context,
        "num_speculative_tokens": num_speculative_tokens,
        "source": source,
        "target": target,
        "layouts": rows,
    }


def _known(layouts: Sequence[str] | Mapping[str, Ready]) -> dict[str, Ready]:
    if isinstance(layouts, Mapping):
        found = dict(layouts)
    else:
        for name in layouts:
            if list(layouts).count(name) > 1:
                raise CmxError(f"layout {name!r} is given twice")
        found = {name: ready(name) for name in layouts}
    if not found:
        raise CmxError("no layout is given, expected at least one")
    return found


def _of(name: str, fn: Callable[..., Any], *args: Any, **fields: Any) -> Any:
    """What a function gives; a mistake names the layout."""
    try:
        return fn(*args, **fields)
    except CmxError as error:
        raise CmxError(f"layout {name}: {error}") from None


def _traced(
    c: ModelConfig,
    layout: Layout,
    found: Ready,
    *,
    step: str,
    batch: int,
    context: int,
    drafts: int,
    **how: Any,
) -> dict[str, Any]:
    """All of a layout that needs no weights."""
    machine, per_npu = found.machine, found.ranks_per_npu
    trace = trace_model(
        c,
        layout,
        step,
        batch=batch,
        context=context,
        drafts=drafts,
        ranks_per_npu=per_npu,
        machine=machine,
        **how,
    )
    sequences = batch * layout.ranks // per_npu
    each = sequences // layout.data_ranks
    predicted, unfit = _predicted(c, layout, found, step, batch, context, drafts)
    between = traffic(trace.found.collectives, dict(layout.axes))
    return {
        "about": found.about,
        "machine": {"name": machine.name, "nodes": machine.nodes, "hbm_gb_per_npu": machine.npu.hbm_gb},
        "ranks": layout.ranks,
        "ranks_per_npu": per_npu,
        "sequences": sequences,
        "moved": _moved(trace),
        "flops": trace.flops,
        "memory": by_layout(c, layout, each, context, step == "prefill", drafts),
        "program": trace.memory,
        "seconds": trace.seconds,
        "node_traffic": by_node(between, machine, per_npu).tolist(),
        "measured": None,
        "predicted_ms": predicted,
        "notes": [*trace.notes, *unfit],
    }


def _predicted(
    c: ModelConfig, layout: Layout, found: Ready, step: str, batch: int, context: int, drafts: int
) -> tuple[float | None, list[str]]:
    """Milliseconds of the step with INT8 weights, where the machine and the exchange are known to the cost
    model; and why it is not."""
    hardware = {CLOUDMATRIX384.name: "cloudmatrix384", H800_NODE.name: "h800"}.get(found.machine.name)
    unknown = layout.tensor or layout.auto or layout.exchange not in ("flat", "hierarchical")
    if hardware is None or unknown or MACHINES[hardware].ranks_per_npu != found.ranks_per_npu:
        return None, []
    try:
        found_ms = predict(c, hardware, layout, step, batch=batch, context=context, drafts=drafts).step_ms
        return found_ms, []
    except CmxError as error:
        return None, [f"no time is predicted: {error}"]


def _moved(trace: Trace) -> list[dict[str, Any]]:
    """A row for each set of axes and plane, in the program's order."""
    found: dict[tuple[str, str], dict[str, Any]] = {}
    for row in trace.collectives:
        where = {"axes": ",".join(row["axes"]), "plane": row["plane"]}
        sums = found.setdefault(tuple(where.values()), where | {"payload_bytes": 0, "wire_bytes": 0})
        for of in ("payload_bytes", "wire_bytes"):
            sums[of] += row[of]
    return list(found.values())
