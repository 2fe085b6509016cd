"""The operators of a traced step: its products and collectives, grouped and named as in the paper.

A step is a few loops over layers. In each loop, every stream (microbatch) runs its operators in the order of
`STAGES`; operators that belong to no stream, such as the head, run alone. FLOPs and bytes are those of the
program. `attention_work` gives the part of them that a fused kernel needs: it computes only scores of tokens
that a token sees, and reads keys and values once.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache

from cmx_jax.analysis.trace.abstract_steps import PAGE_WIDTH, trace_step
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
    """One execution of one stage in one stream.

    Attributes:
      stage: Name from `STAGES`.
      products: Matmuls of the stage, as traced.
      collectives: Collectives of the stage, as traced.
    """

    stage: str
    products: list[Product] = field(default_factory=list)
    collectives: list[Collective] = field(default_factory=list)


@dataclass
class Loop:
    """A loop over equal layers.

    Attributes:
      times: Number of layers.
      mtp: True for the MTP layer.
      streams: Operators of one layer in order, keyed by stream; None is the key of those in no microbatch.
    """

    times: int
    mtp: bool
    streams: dict[int | None, list[Operator]]


@dataclass(frozen=True)
class Step:
    """Sizes of a model's step on one rank.

    Attributes:
      c: Configuration of the model.
      layout: Layout of the model on its ranks.
      kind: Either `decode` or `prefill`.
      sequences: Number of rows in the batch of a data rank.
      context: Number of tokens of each sequence: in the cache (decode) or in the prompt (prefill).
      drafts: Number of MTP drafts verified; in prefill, nonzero if the MTP layer runs.
    """

    c: ModelConfig
    layout: Layout
    kind: str
    sequences: int
    context: int
    drafts: int

    @property
    def tokens(self) -> int:
        """Number of tokens that one rank processes in a step, in all streams."""
        per_sequence = self.context if self.kind == "prefill" else 1 + self.drafts
        return self.sequences * per_sequence // self.layout.sequence_ranks

    @property
    def stream_tokens(self) -> float:
        """Number of tokens that one rank processes in each stream."""
        return self.tokens / self.layout.microbatches

    @property
    def span(self) -> int:
        """Number of positions that the program attends over: whole pages (decode), or the prompt."""
        return self.context if self.kind == "prefill" else -(-self.context // PAGE_WIDTH) * PAGE_WIDTH

    @property
    def visible(self) -> float:
        """Mean share of the span that a token sees: a prompt's tokens see only tokens up to themselves."""
        return (self.span + 1) / (2 * self.span) if self.kind == "prefill" else self.context / self.span


@lru_cache(maxsize=1024)
def trace(step: Step) -> Contents:
    """Traces the step at full size and returns the contents of its jaxpr."""
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
    """Returns the operators of a step by loop. Loops of equal length count as one: that changes no sum."""
    contents, microbatches = trace(step), step.layout.microbatches
    by_loop: dict[tuple[int, bool], dict[tuple[int | None, str], Operator]] = {}
    for x in contents.operations:
        scopes = x.scope.split("/")
        stream = _stream(scopes, microbatches)
        stage = _stage(scopes)
        operators = by_loop.setdefault((x.known, "MTP" in scopes), {})
        operator = operators.setdefault((stream, stage), Operator(stage))
        if isinstance(x, Product):
            operator.products.append(x)
        else:
            operator.collectives.append(x)
    result = []
    for (times, mtp), operators in by_loop.items():
        streams: dict[int | None, list[Operator]] = {}
        for (stream, _), operator in sorted(operators.items(), key=lambda item: STAGES.index(item[0][1])):
            streams.setdefault(stream, []).append(operator)
        result.append(Loop(times, mtp, streams))
    return tuple(result)


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
    """Returns whether an einsum of attention pairs tokens with tokens, rather than tokens with weights."""
    return {"t", "s"} <= set(label.partition("->")[0])


def attention_work(operator: Operator, step: Step) -> tuple[float, float]:
    """Returns FLOPs and bytes of attention as one kernel.

    Only tokens that a token sees count. The weighted sum is over the latent alone if cached rows are wider.
    Queries, keys, values and the result are moved once.
    """
    a, flops, moved = step.c.attention, 0.0, 0.0
    latent = isinstance(a, MLAConfig) and step.kind == "decode"
    for i, p in enumerate(operator.products):
        narrow = a.kv_lora_rank / a.row_dim if latent and i % 2 and isinstance(a, MLAConfig) else 1.0
        flops += p.flops * step.visible * narrow
        batch, m, k, n = p.shape
        if i % 2:  # the sum: its values, unless they are the keys' rows, and its result
            share = step.context / step.span
            moved += 2 * batch * ((0 if latent else k * n * share) + m * n * narrow)
        else:
            moved += 2 * batch * (m * k + k * n * step.context / step.span)
    return flops, moved
