"""`compare`: one step of a model under several layouts."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from cmx_jax.analysis.compare.comparison import Comparison, LayoutRow, MachineInfo, Moved
from cmx_jax.analysis.compare.measured_step import Measure
from cmx_jax.analysis.cost.constants import MACHINES
from cmx_jax.analysis.predict.predict import predict
from cmx_jax.analysis.trace.memory import by_layout
from cmx_jax.analysis.trace.trace_model import trace_model
from cmx_jax.errors import CmxError
from cmx_jax.mesh.host import MAX_COLLECTIVE_CPU_DEVICES, request_devices
from cmx_jax.mesh.layout import Layout
from cmx_jax.mesh.named_layouts import NamedLayout, named_layout
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
    layouts: Sequence[str] | Mapping[str, NamedLayout],
    *,
    step: str | None = None,
    batch: int | None = None,
    context: int | None = None,
    num_speculative_tokens: int = 0,
    source: str = "jaxpr",
    target: str = "cpu",
    runner: str = "lanes",
    progress: Callable[[str], None] = lambda _: None,
) -> Comparison:
    """Compares a step under several layouts; with weights at hand, the step also runs on this machine.

    Args:
      model: Preset, which is only traced; or a directory or `tiny`, which also runs.
      layouts: Names that `cmx_jax.mesh.named_layouts.ready` knows, or layouts of your own by name.
      step: `decode` or `prefill`; None for the step that the first layout is for.
      batch: Sequences per NPU; None for the first layout's.
      context: Tokens of each sequence; None for 4,096, or the model's context if that is less.
      num_speculative_tokens: MTP drafts of a decode step.
      source: Source of collectives and products: `jaxpr`, `stablehlo` or `hlo` (the compiler's).
      target: Target of the compiler, as `cmx_jax.mesh.targets.target_devices` takes it.
      runner: Runner of the step on this machine, `lanes` or `devices`.
      progress: Called with a line about each thing that is being done.

    Raises:
      CmxError: A model or layout is unknown, a layout is given twice, or a batch or context does not fit one.
    """
    c, named = config_of(model), _named_layouts(layouts)
    first = next(iter(named.values()))
    step = step or first.step
    if step not in STEPS:
        raise CmxError(f"step {step!r}, expected one of {list(STEPS)}")
    if runner not in RUNNERS:
        raise CmxError(f"runner {runner!r}, expected one of {list(RUNNERS)}")
    batch = first.batch if batch is None else batch
    context = min(USUAL_CONTEXT, c.max_position_embeddings) if context is None else context
    job = _Job(c, step, batch, context, num_speculative_tokens, source, target)
    by_name: dict[str, Layout] = {}
    for name, known in named.items():
        with _errors_of_layout(name):
            by_name[name] = known.make(c.n_routed_experts)
    widest = max(layout.ranks for layout in by_name.values())
    if source == "hlo" and target == "cpu":  # all of them before JAX starts
        request_devices(widest)
    elif runner == "devices":
        request_devices(min(widest, MAX_COLLECTIVE_CPU_DEVICES))
    rows = []
    for name, layout in by_name.items():
        progress(f"tracing {name}")
        with _errors_of_layout(name):
            rows.append(_traced_row(name, job, layout, named[name]))
    if isinstance(directory := located(model), Path):
        run = Measure(directory, step, context, num_speculative_tokens, runner)
        rows = [_measured_row(row, run, by_name[row.name], progress) for row in rows]
    return Comparison(model, step, batch, context, num_speculative_tokens, source, target, rows)


@dataclass(frozen=True)
class _Job:
    """The step that every layout is traced for; see `compare`."""

    c: ModelConfig
    step: str
    batch: int
    context: int
    drafts: int
    source: str
    target: str


def _named_layouts(layouts: Sequence[str] | Mapping[str, NamedLayout]) -> dict[str, NamedLayout]:
    if isinstance(layouts, Mapping):
        named = dict(layouts)
    else:
        for name in layouts:
            if list(layouts).count(name) > 1:
                raise CmxError(f"layout {name!r} is given twice")
        named = {name: named_layout(name) for name in layouts}
    if not named:
        raise CmxError("no layout is given, expected at least one")
    return named


@contextmanager
def _errors_of_layout(name: str) -> Iterator[None]:
    """Puts the layout's name in front of an error's message."""
    try:
        yield
    except CmxError as error:
        raise CmxError(f"layout {name}: {error}") from None


def _traced_row(name: str, job: _Job, layout: Layout, named: NamedLayout) -> LayoutRow:
    """Traces a layout's step and returns everything that needs no weights."""
    c, machine, per_npu = job.c, named.machine, named.ranks_per_npu
    trace = trace_model(
        c,
        layout,
        job.step,
        batch=job.batch,
        context=job.context,
        drafts=job.drafts,
        ranks_per_npu=per_npu,
        machine=machine,
        source=job.source,
        target=job.target,
    )
    sequences = job.batch * layout.ranks // per_npu
    per_data_rank = sequences // layout.data_ranks
    predicted_ms, reasons = _predicted_ms(job, layout, named)
    sent = traffic(trace.contents.collectives, dict(layout.axes))
    return LayoutRow(
        name=name,
        about=named.about,
        machine=MachineInfo(machine.name, machine.nodes, machine.npu.hbm_gb),
        ranks=layout.ranks,
        ranks_per_npu=per_npu,
        sequences=sequences,
        moved=_moved(trace),
        flops=trace.flops,
        memory=by_layout(c, layout, per_data_rank, job.context, job.step == "prefill", job.drafts),
        program=trace.memory,
        seconds=trace.seconds,
        node_traffic=by_node(sent, machine, per_npu).tolist(),
        measured=None,
        predicted_ms=predicted_ms,
        notes=[*trace.notes, *reasons],
    )


def _measured_row(row: LayoutRow, run: Measure, layout: Layout, progress: Callable[[str], None]) -> LayoutRow:
    """Runs a layout's step and returns the row with its measurement, or with the reason why there is none."""
    progress(f"running {row.name}")
    try:
        return replace(row, measured=run(layout, row.sequences))
    except CmxError as error:
        return replace(row, notes=[*row.notes, f"not run: {error}"])


def _predicted_ms(job: _Job, layout: Layout, named: NamedLayout) -> tuple[float | None, list[str]]:
    """Predicts the step's milliseconds with INT8 weights.

    Returns:
      The time, or None where the cost model does not know the machine or the exchange, or where the step does
      not fit; for the last, also the reason.
    """
    hardware = {CLOUDMATRIX384.name: "cloudmatrix384", H800_NODE.name: "h800"}.get(named.machine.name)
    unknown = layout.tensor or layout.auto or layout.exchange not in ("flat", "hierarchical")
    if hardware is None or unknown or MACHINES[hardware].ranks_per_npu != named.ranks_per_npu:
        return None, []
    try:
        prediction = predict(
            job.c, hardware, layout, job.step, batch=job.batch, context=job.context, drafts=job.drafts
        )
        return prediction.step_ms, []
    except CmxError as error:
        return None, [f"no time is predicted: {error}"]


def _moved(trace: Trace) -> list[Moved]:
    """Sums a trace's collectives by axes and plane, in the program's order."""
    sums: dict[tuple[str, str], Moved] = {}
    for row in trace.collectives:
        key = ",".join(row["axes"]), row["plane"]
        total = sums.get(key, Moved(*key, payload_bytes=0, wire_bytes=0))
        sums[key] = replace(
            total,
            payload_bytes=total.payload_bytes + row["payload_bytes"],
            wire_bytes=total.wire_bytes + row["wire_bytes"],
        )
    return list(sums.values())
