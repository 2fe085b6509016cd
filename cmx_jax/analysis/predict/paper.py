"""The paper's end-to-end tables beside the model's predictions. No row here sets a constant of the model.

A prediction uses only the inputs that a row states: model, batch, lengths, SLO. If the paper does not
describe the load of the experts, all experts are equally popular.

CloudMatrix384's decode runs in two microbatches, as in section 4.2.3; if these miss the row's SLO and a
single one does not, in one. The cores are split so as to balance the streams.
"""

from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from typing import Any

from cmx_jax.analysis.cost import constants
from cmx_jax.analysis.cost.measured import PaperRow, operator_rows
from cmx_jax.analysis.predict.predict import predict
from cmx_jax.analysis.predict.prediction import Prediction
from cmx_jax.mesh.layout import Layout, expert_parallel
from cmx_jax.mesh.named_layouts import named_layout
from cmx_jax.model.config import ModelConfig
from cmx_jax.model.families import preset

EXPERTS = 256


@dataclass(frozen=True)
class PrefillRow:
    """A row of Table 3: 16,384 tokens an accelerator, prompts of 4,096.

    Attributes:
      hardware: Name from `cmx_jax.analysis.cost.constants.MACHINES`.
      name: System, as the table names it.
      tokens_per_s: Published tokens per second of an accelerator.
      per_tflops: Published tokens per second per TFLOPS.
      balanced: True if experts were perfectly balanced.
      note: Remark on the row.
    """

    hardware: str
    name: str
    tokens_per_s: float
    per_tflops: float
    balanced: bool
    note: str = ""


@dataclass(frozen=True)
class DecodeRow:
    """A row of Table 4 or 5.

    Attributes:
      table: Number of the table.
      hardware: Name from `cmx_jax.analysis.cost.constants.MACHINES`.
      name: System or setting, as the table names it.
      batch: Number of sequences per accelerator.
      context: Mean number of tokens of a sequence, over its life.
      tpot_ms: Published time per output token.
      tokens_per_s: Published tokens per second of an accelerator.
      drafts: Number of MTP drafts.
      slo_ms: Objective for the time per output token (Table 5).
      ranks: Number of ranks in the expert-parallel group (GPUs).
      balanced: True if experts were perfectly balanced.
      acceptance: Probability that a draft is right, in the tokens per second of the source; for the time per
        token the paper has 0.7.
      note: Remark on the row.
    """

    table: str
    hardware: str
    name: str
    batch: int
    context: int
    tpot_ms: float
    tokens_per_s: float
    drafts: int = 1
    slo_ms: float = 50.0
    ranks: int = 320
    balanced: bool = False
    acceptance: float = 0.7
    note: str = ""


POPULAR = "how popular experts were is not published; were all alike, EPLB would leave nothing to win"
AVERAGE = "the mean of a day of live traffic, of machines that are not always full"
PREFILLS = (
    PrefillRow("h800", "DeepSeek on H800 (blog)", 4026, 2.03, False, AVERAGE),
    PrefillRow("h100", "SGLang on H100 (default)", 6288, 3.18, False, POPULAR),
    PrefillRow("cloudmatrix384", "CloudMatrix-Infer (default)", 5655, 3.76, False, POPULAR),
    PrefillRow("h800", "DeepSeek on H800 (profile)", 7839, 3.96, True),
    PrefillRow("h100", "SGLang on H100 (perfect EPLB)", 7417, 3.75, True),
    PrefillRow("cloudmatrix384", "CloudMatrix-Infer (perfect EPLB)", 6688, 4.45, True),
)
DECODES = (
    DecodeRow(
        "4",
        "h800",
        "DeepSeek on H800 (blog)",
        128,
        4989,
        50.0,
        1850,
        0,
        ranks=144,
        note=AVERAGE + "; batch not given",
    ),
    DecodeRow(
        "4",
        "h800",
        "DeepSeek on H800 (profile)",
        128,
        4096,
        50.2,
        2325,
        0,
        ranks=128,
        balanced=True,
        note="both cannot be: 128 sequences at 50.2 ms are 2,550 tokens/s",
    ),
    DecodeRow(
        "4",
        "h100",
        "SGLang on H100 (simulated MTP)",
        128,
        4000,
        55.6,
        2172,
        1,
        ranks=72,
        acceptance=0.6,
        note="SGLang's report counts 60 % of drafts as right, the paper's time of a token 70 %",
    ),
    DecodeRow("4", "cloudmatrix384", "CloudMatrix-Infer", 96, 4096, 49.4, 1943),
    DecodeRow("5", "cloudmatrix384", "50 ms, 1024 + 1024 tokens", 128, 1024 + 512, 46.8, 2733),
    DecodeRow("5", "cloudmatrix384", "50 ms, 2048 + 256 tokens", 112, 2048 + 128, 47.4, 2360),
    DecodeRow("5", "cloudmatrix384", "50 ms, 4096 + 256 tokens", 96, 4096 + 128, 49.4, 1943),
    DecodeRow("5", "cloudmatrix384", "30 ms, 4096 + 256 tokens", 24, 4096 + 128, 24.6, 974, slo_ms=30),
    DecodeRow("5", "cloudmatrix384", "15 ms, 4096 + 256 tokens", 8, 4096 + 128, 14.9, 538, slo_ms=15),
)


@dataclass(frozen=True)
class GroupErrors:
    """Summary of a group of rows.

    Attributes:
      group: Name of the group.
      rows: Number of rows.
      mean: Mean absolute relative error.
      worst: Largest absolute relative error.
      worst_row: Row with the largest error.
    """

    group: str
    rows: int
    mean: float
    worst: float
    worst_row: str


@dataclass(frozen=True)
class PaperReport:
    """Published figures beside their predictions.

    Attributes:
      rows: Rows of operators, then of whole systems.
      summary: Errors of each group of rows.
    """

    rows: list[PaperRow]
    summary: list[GroupErrors]

    def as_dict(self) -> dict[str, object]:
        """Returns the report as `cmx predict --paper --json` prints it."""
        return {
            "rows": [row.as_dict() for row in self.rows],
            "summary": [asdict(errors) for errors in self.summary],
        }


def paper() -> PaperReport:
    """Returns every published figure beside its prediction."""
    c = preset("deepseek-r1")
    rows = operator_rows()
    for prefill in PREFILLS:
        rows += _prefill(c, prefill)
    for decode in DECODES:
        rows += _decode(c, decode)
    rows += _pipeline(c)
    return PaperReport(rows, summary(rows))


def _group(hardware: str) -> str:
    return "CloudMatrix end to end" if hardware == "cloudmatrix384" else "H800 and H100 end to end"


def _prefill(c: ModelConfig, row: PrefillRow) -> Iterable[PaperRow]:
    machine = constants.machine(row.hardware)
    if machine.kind == "ascend":
        layout = replace(named_layout("ep32").make(EXPERTS), microbatches=2)
    else:
        layout = _gpu_layout(32, redundant_slots=32)
    imbalance = 1.0 if row.balanced else None
    drafts = int(machine.kind == "ascend")  # decode has MTP, which needs the prompt's rows
    rate = predict(
        c, machine, layout, "prefill", batch=4, context=4096, drafts=drafts, imbalance=imbalance
    ).tokens_per_s
    group = _group(row.hardware)
    yield PaperRow("3", row.name, "tokens/s", row.tokens_per_s, rate, "predicted", group, row.note)
    per_tflops = rate / machine["int8_tops"] / machine.ranks_per_npu
    yield PaperRow("3", row.name, "tokens/s/TFLOPS", row.per_tflops, per_tflops, "predicted", group, row.note)


def _gpu_layout(ranks: int, **fields: Any) -> Layout:
    return expert_parallel(ranks, EXPERTS, exchange="hierarchical", wire="int8", microbatches=2, **fields)


def _decode(c: ModelConfig, row: DecodeRow) -> Iterable[PaperRow]:
    prediction = _decode_prediction(c, row)
    split = f", {prediction.attention_cores} cores attend" if prediction.attention_cores else ""
    note = row.note or f"microbatches: {prediction.microbatches}{split}"
    group = _group(row.hardware)
    assert prediction.tpot_ms is not None
    tpot_ms = prediction.tpot_ms
    yield PaperRow(row.table, row.name, "ms a token", row.tpot_ms, tpot_ms, "predicted", group, note)
    tokens = 1 + row.acceptance * row.drafts
    rate = row.batch * tokens / prediction.step_ms * 1e3
    yield PaperRow(row.table, row.name, "tokens/s", row.tokens_per_s, rate, "predicted", group, note)


def _decode_prediction(c: ModelConfig, row: DecodeRow) -> Prediction:
    machine = constants.machine(row.hardware)

    def prediction(layout: Layout) -> Prediction:
        return predict(
            c,
            machine,
            layout,
            "decode",
            batch=row.batch,
            context=row.context,
            drafts=row.drafts,
            imbalance=1.0 if row.balanced else None,
        )

    if machine.kind == "gpu":
        redundant = -EXPERTS % row.ranks
        return prediction(_gpu_layout(row.ranks, redundant_slots=redundant, mailbox_rows=0))
    two = prediction(_decode_layout())
    if two.tpot_ms is not None and two.tpot_ms <= row.slo_ms:
        return two
    one = prediction(_decode_layout(1))
    return one if one.tpot_ms is not None and one.tpot_ms <= row.slo_ms else two


def _decode_layout(microbatches: int = 2) -> Layout:
    return replace(named_layout("ep320").make(EXPERTS), microbatches=microbatches)


def _pipeline(c: ModelConfig) -> Iterable[PaperRow]:
    """Yields the rows of section 4.2.3: the split of the cores, and the time of each stream.

    The batch is 96 sequences of 4,096 tokens.
    """
    prediction = predict(c, "cloudmatrix384", _decode_layout(), "decode", batch=96, context=4096, drafts=1)
    group = "CloudMatrix streams"
    cores, stream_us = prediction.attention_cores, prediction.stream_us
    assert cores is not None
    assert stream_us is not None
    yield PaperRow("4.2.3", "cores of the attention stream", "AIC", 16, cores, "predicted", group)
    for engine, us in stream_us.items():
        name = f"{engine.removesuffix(' cores')} stream, a layer and microbatch"
        yield PaperRow("4.2.3", name, "us", 600, us, "predicted", group)


def summary(rows: list[PaperRow]) -> list[GroupErrors]:
    """Returns the errors of each group of rows."""
    groups = []
    for group in dict.fromkeys(row.group for row in rows):
        members = [row for row in rows if row.group == group]
        worst = max(members, key=lambda row: abs(row.error))
        mean = sum(abs(row.error) for row in members) / len(members)
        name = f"{worst.name}, {worst.unit}"
        groups.append(GroupErrors(group, len(members), mean, abs(worst.error), name))
    return groups


def render(report: PaperReport) -> str:
    """Returns the rows as a table, followed by the errors of each group."""
    lines = [f"{'table':9}{'row':38}{'unit':17}{'published':>10}{'predicted':>11}{'error':>8}  role"]
    for row in report.rows:
        numbers = f"{row.published:>10,.4g}{row.predicted:>11,.4g}{row.error:>+8.1%}"
        note = f"  {row.note}" if row.note else ""
        lines.append(f"{row.table:9}{row.name:38}{row.unit:17}{numbers}  {row.role}{note}")
    for errors in report.summary:
        lines.append(
            f"{errors.group}: {errors.rows} rows, mean error {errors.mean:.1%}, "
            f"worst {errors.worst:.1%} ({errors.worst_row})"
        )
    return "\n".join(lines)
