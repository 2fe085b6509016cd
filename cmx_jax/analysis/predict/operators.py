"""The operators of a traced step: its products and collectives, grouped and named as the paper does.

A step is a few loops over layers. In each, every stream (microbatch) has its operators in the order below;
what belongs to no stream, such as the head, runs by itself. FLOPs and bytes are the program's; beside them
stands what a fused kernel needs of them: attention looks only at what a token sees, and reads keys and
values once.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache

from cmx_jax.analysis.trace.steps import PAGE_WIDTH, trace_step
from cmx_jax.mesh.layout import Layout
from cmx_jax.mesh.trace.jaxpr import read_jaxpr
from cmx_jax.mesh.trace.ops.collective import Collective
from cmx_jax.mesh.trace.ops.contents import Contents, Product
from cmx_jax.model.config import MLAConfig, ModelConfig

ATTENTION = (
    "Norm",
    "MLAProlog",
    "QKV",
    "GatherLatents",
    "KeysAndValues",
    "FusedAttention",
    "HeadsToTokens",
    "O_proj",
)
STAGES = (
    *ATTENTION,
    "DenseFFN",
    "Gate",
    "SharedExpert",
    "Dispatch",
    "MLP",
    "Combine",
    "EHProj",
    "LMHead",
    "Other",
)
"""Operators in the order in which a stream runs them."""


@dataclass
class Operator:
    """What one stream does at one stage, once.

    Attributes:
      stage: of `STAGES`.
      products: matmuls, as traced.
      collectives: likewise.
    """

    stage: str
    products: list[Product] = field(default_factory=list)
    collectives: list[Collective] = field(default_factory=list)


@dataclass
class Loop:
    """Layers that are alike: how many, and each stream's operators in one; stream None: of no microbatch."""

    times: int
    mtp: bool
    streams: dict[int | None, list[Operator]]


@dataclass(frozen=True)
class Step:
    """A step of a model on one rank, by its sizes.

    Attributes:
      c: the model.
      layout: how it lies on its ranks.
      kind: `decode` or `prefill`.
      sequences: rows of a data rank's batch.
      context: tokens of each sequence that are there: cached (decode) or of the prompt (prefill).
      drafts: MTP drafts verified; in prefill whether the MTP layer runs.
    """

    c: ModelConfig
    layout: Layout
    kind: str
    sequences: int
    context: int
    drafts: int

    @property
    def tokens(self) -> int:
        """That one rank takes through its layers, in all streams."""
        each = self.context if self.kind == "prefill" else 1 + self.drafts
        return self.sequences * each // self.layout.sequence_ranks

    @property
    def stream_tokens(self) -> float:
        return self.tokens / self.layout.microbatches

    @property
    def span(self) -> int:
        """Addresses that the program attends over: whole pages (decode), or the prompt."""
        return self.context if self.kind == "prefill" else -(-self.context // PAGE_WIDTH) * PAGE_WIDTH

    @property
    def seen(self) -> float:
        """Share of the span that a token sees, on average: a prompt's tokens only what stands before them."""
        return (self.span + 1) / (2 * self.span) if self.kind == "prefill" else self.context / self.span


@lru_cache(maxsize=1024)
def traced(step: Step) -> Contents:
    """The jaxpr of the step at full size, read."""
    program = trace_step(
        step.c,
        step.layout,
        step.kind,
        sequences=step.sequences,
        context=step.context,
        length=step.context,
        drafts=step.drafts,
    )
    return read_jaxpr(program.jaxpr)


@lru_cache(maxsize=1024)
def loops(step: Step) -> tuple[Loop, ...]:
    """The operators of a step by loop. Loops of equal length count as one: that changes no sum."""
    found, microbatches = traced(step), step.layout.microbatches
    by_loop: dict[tuple[int, bool], dict[tuple[int | None, str], Operator]] = {}
    for x in (*found.products, *found.collectives):
        scopes = x.scope.split("/")
        stream = _stream(scopes, microbatches)
        stage = _stage(scopes)
        here = by_loop.setdefault((x.known, "MTP" in scopes), {})
        operator = here.setdefault((stream, stage), Operator(stage))
        (operator.products if isinstance(x, Product) else operator.collectives).append(x)  # type: ignore[arg-type]
    made = []
    for (times, mtp), operators in by_loop.items():
        streams: dict[int | None, list[Operator]] = {}
        for (stream, _), operator in sorted(operators.items(), key=lambda item: STAGES.index(item[0][1])):
            streams.setdefault(stream, []).append(operator)
        made.append(Loop(times, mtp, streams))
    return tuple(made)


def _stream(scopes: Sequence[str], microbatches: int) -> int | None:
    if microbatches == 1:
        return 0
    return next((int(s[6:]) for s in scopes if s.startswith("Stream") and s[6:].isdecimal()), None)


def _stage(scopes: list[str]) -> str:
    label = scopes[-1]
    if label == "tk,tkd->td":  # the weighted sum is combine's
        return "Combine"
    if label == "bte,ed->btd":
        return "EHProj"
    stage = next((s for s in reversed(scopes) if s in STAGES), "Other")
    if stage == "FusedAttention" and not scores_or_sum(label):
        return "KeysAndValues"
    return stage


def scores_or_sum(label: str) -> bool:
    """Whether an einsum of attention pairs tokens with what they see, rather than applying weights."""
    return {"t", "s"} <= set(label.partition("->")[0])


def attention_work(operators: Operator, step: Step) -> tuple[float, float]:
    """FLOPs and bytes of attention as one kernel: without what a token does not see, the sum over the latent
    alone where rows are wider, queries, keys, values and result moved once."""
    a, flops, moved = step.c.attention, 0.0, 0.0
    latent = isinstance(a, MLAConfig) and step.kind == "decode"
    for i, p in enumerate(operators.products):
        narrow = a.kv_lora_rank / a.row_dim if latent and i % 2 and isinstance(a, MLAConfig) else 1.0
        flops += p.flops * step.seen * narrow
        batch, m, k, n = p.shape
        if i % 2:  # the sum: its values, unless they are the keys' rows, and its result
            share = step.context / step.span
            moved += 2 * batch * ((0 if latent else k * n * share) + m * n * narrow)
        else:
            moved += 2 * batch * (m * k + k * n * step.context / step.span)
    return flops, moved
