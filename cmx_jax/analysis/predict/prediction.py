"""Records of a prediction, and its text."""

from dataclasses import asdict, dataclass

from cmx_jax.analysis.predict.roofline import RankMemory, Roofline


@dataclass(frozen=True)
class OperatorTime:
    """Time of an operator in a step.

    Attributes:
      operator: Name of the operator.
      ms: Time for which the step waits for the operator; these times add up to the step.
      busy_ms: Total running time in all streams, including the time in which other operators hide it.
    """

    operator: str
    ms: float
    busy_ms: float


@dataclass(frozen=True)
class Prediction:
    """Predicted time of a step, and quantities derived from it.

    Attributes:
      hardware: Name of the machine.
      step: Either `decode` or `prefill`.
      batch: Number of sequences per NPU.
      context: Number of tokens of each sequence.
      drafts: Number of MTP drafts.
      microbatches: Number of streams of the step.
      imbalance: Load of the busiest expert rank relative to the mean.
      step_ms: Time of the step.
      tokens_per_s: Tokens per second of an NPU.
      tpot_ms: Time per output token; None in prefill.
      bound: Resource or phase that accounts for most of the step.
      attention_cores: Number of a die's cores that attention has; None if streams share all cores.
      stream_us: Time that one microbatch needs each stream's cores in one layer, keyed by stream; None if
        streams share all cores.
      breakdown: Times of the operators, longest first.
      roofline: The least time that the step could take.
      memory_gb: Memory that a rank needs.
      flops: Operations as traced, keyed by type.
      wire_bytes: Bytes that a rank sends, as traced.
    """

    hardware: str
    step: str
    batch: int
    context: int
    drafts: int
    microbatches: int
    imbalance: float
    step_ms: float
    tokens_per_s: float
    tpot_ms: float | None
    bound: str
    attention_cores: int | None
    stream_us: dict[str, float] | None
    breakdown: tuple[OperatorTime, ...]
    roofline: Roofline
    memory_gb: RankMemory
    flops: dict[str, int]
    wire_bytes: float

    def as_dict(self) -> dict[str, object]:
        """Returns the prediction as `cmx predict --json` prints it."""
        return asdict(self)


@dataclass(frozen=True)
class Sensitivity:
    """Time of a step with one constant changed.

    Attributes:
      constant: Name of the constant.
      value: Value of the constant before the change.
      unit: Unit of the value.
      source: Source of the value.
      step_ms: Time of the step after the change.
      change: Relative change of the step's time.
    """

    constant: str
    value: float
    unit: str
    source: str
    step_ms: float
    change: float


def render(prediction: Prediction) -> str:
    """Returns a prediction as text for a terminal."""
    p = prediction
    head = [
        f"{p.step} on {p.hardware}: {p.batch} sequences an NPU, "
        f"{p.context} tokens each, microbatches: {p.microbatches}",
        f"step {p.step_ms:.2f} ms, {p.tokens_per_s:,.0f} tokens/s an NPU"
        + (f", {p.tpot_ms:.2f} ms a token" if p.tpot_ms else "")
        + f"; bound by {p.bound}",
        f"roofline {p.roofline.step_ms:.2f} ms ({p.roofline.bound}); "
        f"busiest expert rank {p.imbalance:.2f} x the mean",
    ]
    rows = [f"{row.operator:16}{row.ms:10.3f}{row.busy_ms:12.3f}" for row in p.breakdown]
    return "\n".join([*head, f"{'operator':16}{'ms':>10}{'busy ms':>12}", *rows])
