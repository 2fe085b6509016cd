"""The records that `compare` returns, and their JSON."""

from collections.abc import Callable
from dataclasses import asdict, dataclass


@dataclass(frozen=True)
class MachineInfo:
    """The machine that a layout is for.

    Attributes:
      name: Name of the supernode.
      nodes: Number of nodes.
      hbm_gb_per_npu: Memory of an NPU in GB.
    """

    name: str
    nodes: int
    hbm_gb_per_npu: float


@dataclass(frozen=True)
class Moved:
    """The bytes that one rank sends in one step over one set of mesh axes.

    Attributes:
      axes: Mesh axes, separated by commas; empty if the groups are not those of mesh axes.
      plane: Widest boundary that the messages cross, as `cmx_jax.mesh.trace.ops.place.plane` names it.
      payload_bytes: Useful bytes.
      wire_bytes: Bytes that leave the rank.
    """

    axes: str
    plane: str
    payload_bytes: float
    wire_bytes: float

    @property
    def place(self) -> str:
        """Axes and plane for people: `node,npu across nodes`."""
        planes = {"nodes": "across nodes", "node": "within node"}
        return f"{self.axes or 'other groups'} {planes.get(self.plane, self.plane)}"


@dataclass(frozen=True)
class Measurement:
    """A step that ran on this machine.

    Attributes:
      runner: `lanes` or `devices`.
      step_s: Seconds of the median decode step, or of prefilling all prompts; compilation is not included.
      tokens: Number of greedy tokens that were compared with those of a single rank in float32.
      tokens_equal: Number of them that are equal.
    """

    runner: str
    step_s: float
    tokens: int
    tokens_equal: int


@dataclass(frozen=True)
class LayoutRow:
    """One layout of a comparison. Bytes and operations are those of one rank in one step.

    Attributes:
      name: Name of the layout.
      about: Description in one line.
      machine: Machine that the layout is for.
      ranks: Number of ranks.
      ranks_per_npu: Ranks on each NPU: 2 where a rank is a die.
      sequences: Number of sequences on all ranks together.
      moved: Bytes sent, by mesh axes and plane, in the program's order.
      flops: Operations of matrix products, by type.
      memory: Bytes of memory from shapes alone, by purpose (`cmx_jax.analysis.trace.memory.by_layout`).
      program: Bytes of memory of the traced program, as in `cmx_jax.mesh.trace.Trace.memory`.
      seconds: Seconds of tracing, lowering and compiling, as in `Trace.seconds`.
      node_traffic: Bytes between nodes, `[N, N]`; rows are senders.
      measured: Time and tokens of the step on this machine; None if it did not run.
      predicted_ms: Predicted milliseconds of the step on its machine; None if the cost model has none.
      notes: Sentences on what is uncertain.
    """

    name: str
    about: str
    machine: MachineInfo
    ranks: int
    ranks_per_npu: int
    sequences: int
    moved: list[Moved]
    flops: dict[str, int]
    memory: dict[str, int]
    program: dict[str, int]
    seconds: dict[str, float]
    node_traffic: list[list[float]]
    measured: Measurement | None
    predicted_ms: float | None
    notes: list[str]

    def payload_by_place(self) -> dict[str, float]:
        """Useful bytes by `Moved.place`."""
        return self._by_place(lambda moved: moved.payload_bytes)

    def wire_by_place(self) -> dict[str, float]:
        """Bytes that leave the rank by `Moved.place`."""
        return self._by_place(lambda moved: moved.wire_bytes)

    def _by_place(self, size: Callable[[Moved], float]) -> dict[str, float]:
        sums: dict[str, float] = {}
        for moved in self.moved:
            sums[moved.place] = sums.get(moved.place, 0) + size(moved)
        return sums


@dataclass(frozen=True)
class Comparison:
    """One step of a model under several layouts.

    Attributes:
      model: Name or directory of the model.
      step: `decode` or `prefill`.
      batch: Sequences per NPU.
      context: Tokens of each sequence.
      num_speculative_tokens: MTP drafts of a decode step.
      source: Source of the traces: `jaxpr`, `stablehlo` or `hlo`.
      target: Target that the programs are compiled for.
      layouts: One row for each layout.
    """

    model: str
    step: str
    batch: int
    context: int
    num_speculative_tokens: int
    source: str
    target: str
    layouts: list[LayoutRow]

    def as_dict(self) -> dict[str, object]:
        """The document of `cmx compare --json`: nested dicts and lists, keys as the attributes here."""
        return asdict(self)
