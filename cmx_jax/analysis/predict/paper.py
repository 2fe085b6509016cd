"""The paper's tables beside what is predicted for them. No row here sets a constant of the model.

What is taken from a row is what was given to the system: model, batch, lengths, SLO. Of a load that the
paper does not describe nothing is assumed: every expert is as popular as any other.

CloudMatrix384's decode runs in two microbatches, as section 4.2.3 has it, and where these miss the row's SLO
and one does not, in one. The cores are split as balances the streams.
"""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

from cmx_jax.analysis.cost.constants import machine
from cmx_jax.analysis.cost.measured import operator_rows, row
from cmx_jax.analysis.predict.predict import predict
from cmx_jax.mesh.layout import Layout, expert_parallel
from cmx_jax.mesh.named_layouts import named_layout
from cmx_jax.model.config import ModelConfig
from cmx_jax.model.families import preset

EXPERTS = 256


@dataclass(frozen=True)
class Prefill:
    """A row of Table 3: 16,384 tokens an accelerator, prompts of 4,096."""

    hardware: str
    name: str
    tokens_per_s: float
    per_tflops: float
    balanced: bool
    note: str = ""


@dataclass(frozen=True)
class Decode:
    """A row of Table 4, or of Table 5 (`slo_ms`); `context` is the mean over a sequence's life.

    `ranks`: of the expert-parallel group where that is not the paper's. `acceptance`: with which the source
    of the tokens a second counted drafts; the paper has 0.7 for the time of one.
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
    Prefill("h800", "DeepSeek on H800 (blog)", 4026, 2.03, False, AVERAGE),
    Prefill("h100", "SGLang on H100 (default)", 6288, 3.18, False, POPULAR),
    Prefill("cloudmatrix384", "CloudMatrix-Infer (default)", 5655, 3.76, False, POPULAR),
    Prefill("h800", "DeepSeek on H800 (profile)", 7839, 3.96, True),
    Prefill("h100", "SGLang on H100 (perfect EPLB)", 7417, 3.75, True),
    Prefill("cloudmatrix384", "CloudMatrix-Infer (perfect EPLB)", 6688, 4.45, True),
)
DECODES = (
    Decode(
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
    Decode(
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
    Decode(
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
    Decode("4", "cloudmatrix384", "CloudMatrix-Infer", 96, 4096, 49.4, 1943),
    Decode("5", "cloudmatrix384", "50 ms, 1024 + 1024 tokens", 128, 1024 + 512, 46.8, 2733),
    Decode("5", "cloudmatrix384", "50 ms, 2048 + 256 tokens", 112, 2048 + 128, 47.4, 2360),
    Decode("5", "cloudmatrix384", "50 ms, 4096 + 256 tokens", 96, 4096 + 128, 49.4, 1943),
    Decode("5", "cloudmatrix384", "30 ms, 4096 + 256 tokens", 24, 4096 + 128, 24.6, 974, slo_ms=30),
    Decode("5", "cloudmatrix384", "15 ms, 4096 + 256 tokens", 8, 4096 + 128, 14.9, 538, slo_ms=15),
)


def paper() -> dict[str, Any]:
    """Every published figure beside its prediction.

    Returns:
      `rows`: each `table`, `row`, `unit`, `published`, `predicted`, `error` (relative), `role` (`calibrated`
      or `predicted`), `group`, and `note` where something is known to be amiss; `summary`: for each group
      the number of rows, mean and worst of the errors' sizes.
    """
    c = preset("deepseek-r1")
    rows = operator_rows()
    for prefill in PREFILLS:
        rows += _prefill(c, prefill)
    for decode in DECODES:
        rows += _decode(c, decode)
    rows += _pipeline(c)
    return {"rows": rows, "summary": summary(rows)}


def _group(hardware: str) -> str:
    return "CloudMatrix end to end" if hardware == "cloudmatrix384" else "H800 and H100 end to end"


def _prefill(c: ModelConfig, given: Prefill) -> Iterable[dict[str, Any]]:
    on = machine(given.hardware)
    if on.kind == "ascend":
        layout = replace(named_layout("ep32").make(EXPERTS), microbatches=2)
    else:
        layout = _gpus(32, redundant_slots=32)
    ideal = 1.0 if given.balanced else None
    drafts = int(on.kind == "ascend")  # decode has MTP, which needs the prompt's rows
    found = predict(c, on, layout, "prefill", batch=4, context=4096, drafts=drafts, imbalance=ideal)
    group, rate = _group(given.hardware), found["tokens_per_s"]
    more = {"group": group, "note": given.note}
    yield row("3", given.name, "tokens/s", given.tokens_per_s, rate, "predicted", **more)
    per = rate / on["int8_tops"] / on.ranks_per_npu
    yield row("3", given.name, "tokens/s/TFLOPS", given.per_tflops, per, "predicted", **more)


def _gpus(ranks: int, **fields: Any) -> Layout:
    return expert_parallel(ranks, EXPERTS, exchange="hierarchical", wire="int8", microbatches=2, **fields)


def _decode(c: ModelConfig, given: Decode) -> Iterable[dict[str, Any]]:
    on = machine(given.hardware)
    if on.kind == "ascend":
        layout = _decode_layout()
    else:
        layout = _gpus(given.ranks, redundant_slots=-EXPERTS % given.ranks, mailbox_rows=0)
    sizes: dict[str, Any] = {"batch": given.batch, "context": given.context, "drafts": given.drafts}
    sizes["imbalance"] = 1.0 if given.balanced else None
    found = predict(c, on, layout, "decode", **sizes)
    if found["tpot_ms"] > given.slo_ms and on.kind == "ascend":
        single = predict(c, on, _decode_layout(1), "decode", **sizes)
        found = single if single["tpot_ms"] <= given.slo_ms else found
    how = f"microbatches: {found['microbatches']}"
    how += f", {found['attention_cores']} cores attend" if found["attention_cores"] else ""
    more = {"group": _group(given.hardware), "note": given.note or how}
    yield row(given.table, given.name, "ms a token", given.tpot_ms, found["tpot_ms"], "predicted", **more)
    tokens = 1 + given.acceptance * given.drafts
    rate = given.batch * tokens / found["step_ms"] * 1e3
    yield row(given.table, given.name, "tokens/s", given.tokens_per_s, rate, "predicted", **more)


def _decode_layout(microbatches: int = 2) -> Layout:
    return replace(named_layout("ep320").make(EXPERTS), microbatches=microbatches)


def _pipeline(c: ModelConfig) -> Iterable[dict[str, Any]]:
    """Section 4.2.3: how cores are split at 96 sequences of 4,096 tokens, and how long each stream takes."""
    found = predict(c, "cloudmatrix384", _decode_layout(), "decode", batch=96, context=4096, drafts=1)
    more: dict[str, Any] = {"role": "predicted", "group": "CloudMatrix streams"}
    yield row("4.2.3", "cores of the attention stream", "AIC", 16, found["attention_cores"], **more)
    for engine, us in found["stream_us"].items():
        name = f"{engine.removesuffix(' cores')} stream, a layer and microbatch"
        yield row("4.2.3", name, "us", 600, us, **more)


def summary(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Of each group: rows, mean and worst size of the error, and which row that is."""
    made = []
    for group in dict.fromkeys(r["group"] for r in rows):
        of = [r for r in rows if r["group"] == group]
        worst = max(of, key=lambda r: abs(r["error"]))
        mean = sum(abs(r["error"]) for r in of) / len(of)
        named = f"{worst['row']}, {worst['unit']}"
        made.append(
            {"group": group, "rows": len(of), "mean": mean, "worst": abs(worst["error"]), "worst_row": named}
        )
    return made


def render(found: dict[str, Any]) -> str:
    """The rows as a table, then each group's errors."""
    lines = [f"{'table':9}{'row':38}{'unit':17}{'published':>10}{'predicted':>11}{'error':>8}  role"]
    for r in found["rows"]:
        numbers = f"{r['published']:>10,.4g}{r['predicted']:>11,.4g}{r['error']:>+8.1%}"
        note = f"  {r['note']}" if r.get("note") else ""
        lines.append(f"{r['table']:9}{r['row']:38}{r['unit']:17}{numbers}  {r['role']}{note}")
    for s in found["summary"]:
        lines.append(
            f"{s['group']}: {s['rows']} rows, mean error {s['mean']:.1%}, "
            f"worst {s['worst']:.1%} ({s['worst_row']})"
        )
    return "\n".join(lines)
