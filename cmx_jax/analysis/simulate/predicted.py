"""Step times that `cmx predict` gives: traced programs of a deployment's layouts, on a grid.

A grid has the points 1, 2, 3, 4, 6, 8, 12, 16, ... (`PARTS` per octave) of a unit. A point is predicted when
it is first needed; times between two points are interpolated linearly.

* *decode*: a grid over sequences per rank and, an octave apart, over their tokens. A batch with fewer
  sequences than microbatches takes as long as one sequence per microbatch.
* *prefill*: a grid over tokens of a row, predicted as short prompts. Attention adds a time for each pair of
  tokens of which one attends to the other, and the pairs are counted. A chunk takes its own part of its
  prompt's pairs; the repeated expansion of its past's keys and values is left out.

Between the points, times are within 3 % of a direct prediction, and within 1 % on average.
"""

from collections.abc import Callable
from functools import cached_property
from itertools import count

from cmx_jax.analysis.cost.constants import MachineModel, machine
from cmx_jax.analysis.cost.operator_times import pool_read_s
from cmx_jax.analysis.predict.candidates import transfer_ms
from cmx_jax.analysis.predict.predict import predict
from cmx_jax.analysis.predict.prediction import Prediction
from cmx_jax.analysis.simulate.simulated_deployment import InstancePool
from cmx_jax.analysis.trace.abstract_steps import PAGE_WIDTH
from cmx_jax.analysis.trace.memory import page_bytes
from cmx_jax.errors import CmxError
from cmx_jax.mesh.layout import Layout
from cmx_jax.model.config import ModelConfig
from cmx_jax.serving.scheduling.allocator import Capacity
from cmx_jax.serving.scheduling.packing import Piece

PARTS = 2
CONTEXT = 2 * PAGE_WIDTH  # tokens: shortest context at which decode is predicted
LONG = 8192  # tokens of a prompt whose attention takes long (or the model's longest prompt)
SHORTER = 8  # ratio of that length to one whose attention takes little


def bracket(x: float, unit: int, parts: int, limit: int | None = None) -> tuple[int, int]:
    """The two grid points that enclose `x`, or the grid's first two; neither exceeds `limit`."""
    n = max(int(x / unit), 1)
    step = max((1 << n.bit_length() - 1) // parts, 1)
    low, high = n // step * step * unit, (n // step + 1) * step * unit
    return (low, high) if limit is None else (min(low, limit), min(high, limit))


def interpolate(x: float, ends: tuple[int, int], function: Callable[[int], float]) -> float:
    """Linear interpolation of `function` between two points; constant below the first and at a grid's end."""
    low, high = ends
    first = function(low)
    return first if x <= low or high == low else first + (function(high) - first) * (x - low) / (high - low)


class Predicted:
    """A `StepTimes` of one prefill and one decode layout.

    Args:
      c: Configuration of the model.
      hardware: Name of a machine in `cmx_jax.analysis.cost.constants.MACHINES`.
      prefill: Layout of a prefill instance.
      decode: Layout of a decode instance.
      drafts: MTP drafts per decode step; if above zero, prefill runs the MTP layer.
      context: Tokens per sequence at which all decode steps are predicted; None: those of each step.

    Raises:
      CmxError: The hardware is unknown, or `predict` refuses the model or a layout.
    """

    def __init__(
        self,
        c: ModelConfig,
        hardware: str,
        prefill: Layout,
        decode: Layout,
        *,
        drafts: int = 0,
        context: int | None = None,
    ):
        self.c, self.machine, self.drafts, self.context = c, machine(hardware), drafts, context
        self.layouts = {"prefill": prefill, "decode": decode}
        # grid points need not fit into memory: `pool` limits what runs
        self._boundless = self.machine.scaled("hbm_gb", 1e6)
        self._lines: dict[tuple[int, int], tuple[float, float, float]] = {}
        self._known: dict[tuple[str, int, int], float] = {}
        self._units = {step: self._unit(layout) for step, layout in self.layouts.items()}

    def decode(self, sequences: int, context: float) -> float:
        if self.context is not None:
            context = self.context
        octave = int(context / CONTEXT).bit_length()
        if (sequences, octave) not in self._lines:
            self._lines[sequences, octave] = self._line(sequences, context)
        start, seconds, slope = self._lines[sequences, octave]
        return seconds + slope * max(context - start, 0.0)

    def prefill(self, pieces: list[list[Piece]]) -> float:
        return max(self._row_ms(row) for row in pieces if row) / 1e3

    def transfer(self, tokens: int) -> float:
        return tokens * self._token_s

    @cached_property
    def _token_s(self) -> float:
        return transfer_ms(self.c, self.machine, 1, self.drafts > 0) / 1e3

    def fetch(self, tokens: int) -> float:
        """Seconds in which one die reads the rows of a prefix from the memory pool over UB (Table 1)."""
        if self.machine.kind != "ascend":
            raise CmxError(
                f"{self.machine.name} has no memory pool, expected cloudmatrix384 for a prefix cache"
            )
        return pool_read_s(page_bytes(self.c, tokens, "auto", self.drafts > 0))

    def acceptance(self, chance: float) -> float:
        """Mean number of accepted drafts per step.

        Args:
          chance: Probability that a draft is right if all drafts before it are.

        Raises:
          CmxError: The probability is not within 0 to 1.
        """
        if not 0 <= chance <= 1:
            raise CmxError(f"mtp_acceptance is {chance:g}, expected 0 to 1")
        return sum(chance**i for i in range(1, self.drafts + 1))

    def pool(
        self,
        step: str,
        instances: int,
        *,
        sequences: int = 1,
        budget: int = PAGE_WIDTH,
        tokens: int | None = None,
    ) -> InstancePool:
        """A pool of instances of one step's layout, with the cache that fits into their memory.

        Args:
          step: `prefill` or `decode`.
          instances: Number of instances.
          sequences: Sequences per decode rank.
          budget: Tokens of a prefill step's row.
          tokens: Cached tokens per rank (or per group of ranks that share sequences); None: as many as fit.

        Raises:
          CmxError: Weights, mailboxes and one sequence exceed the memory.
        """
        layout, shared = self.layouts[step], self.layouts[step].sequence_ranks
        if tokens is None:
            if step == "prefill":
                needed = self._predict(step, *self._prompts(max(budget, self._least)), self.machine).memory_gb
            else:
                needed = self._predict(step, sequences, PAGE_WIDTH, self.machine).memory_gb
            left = self.machine["hbm_gb"] - needed.weights - needed.mailboxes
            tokens = int(left * 1e9 * shared / page_bytes(self.c, 1, "auto", self.drafts > 0))
        capacity = Capacity(
            sequences=sequences,
            pages=tokens // PAGE_WIDTH,
            page_width=PAGE_WIDTH,
            max_num_batched_tokens=budget,
        )
        return InstancePool(
            instances=instances,
            npus=layout.ranks // self.machine.ranks_per_npu,
            ranks=layout.data_ranks,
            sharing=shared,
            capacity=capacity,
        )

    def _line(self, sequences: int, context: float) -> tuple[float, float, float]:
        """A decode step's time over one octave of tokens: first token, seconds there, seconds per token."""

        def seconds(length: int) -> float:
            ends = bracket(sequences, self._units["decode"], PARTS)
            return interpolate(sequences, ends, lambda n: self._ms("decode", n, length)) / 1e3

        if self.context is not None:
            return context, seconds(self.context), 0.0
        near, far = bracket(context, CONTEXT, 1, self.c.max_position_embeddings)
        return near, seconds(near), (seconds(far) - seconds(near)) / max(far - near, 1)

    def _row_ms(self, row: list[Piece]) -> float:
        tokens = sum([p.stop - p.start for p in row])
        pairs = sum([(p.stop**2 - p.start**2) / 2 for p in row])
        plain_ms = interpolate(tokens, bracket(tokens, self._least, PARTS), self._plain_ms)
        return plain_ms + pairs * self._pair_ms

    def _plain_ms(self, tokens: int) -> float:
        """Milliseconds of a prefill step at a grid point, without attention."""
        sequences, length = self._prompts(tokens)
        return self._ms("prefill", sequences, length) - self._pair_ms * tokens * length / 2

    @cached_property
    def _pair_ms(self) -> float:
        """Milliseconds of attention per pair of tokens: equally many tokens in long and in short prompts."""
        few, long, short = self._units["prefill"], self._long, self._long // SHORTER
        ms = self._ms("prefill", few, long) - self._ms("prefill", few * SHORTER, short)
        return ms / (few * long * (long - short) / 2)

    @cached_property
    def _long(self) -> int:
        return min(LONG, self.c.max_position_embeddings)

    @cached_property
    def _least(self) -> int:
        """Tokens of the smallest prefill step that is predicted."""
        shared = self.layouts["prefill"].sequence_ranks
        return self._units["prefill"] * shared * max(32 // shared, 1)

    def _prompts(self, tokens: int) -> tuple[int, int]:
        """Number and length of the prompts of a grid point with `tokens` tokens."""
        unit = self._units["prefill"]
        sequences = unit * max(tokens // (unit * self._long // SHORTER), 1)
        return sequences, tokens // sequences

    def _unit(self, layout: Layout) -> int:
        """Fewest sequences per data rank that divide evenly into NPUs and microbatches."""
        ranks, shared = self.machine.ranks_per_npu, layout.sequence_ranks
        sizes = (batch * shared // ranks for batch in count(1) if not batch * shared % ranks)
        return next(n for n in sizes if not n % layout.microbatches)

    def _ms(self, step: str, sequences: int, context: int) -> float:
        key = (step, sequences, context)
        if key not in self._known:
            self._known[key] = self._predict(*key, self._boundless).step_ms
        return self._known[key]

    def _predict(self, step: str, sequences: int, context: int, hardware: MachineModel) -> Prediction:
        layout = self.layouts[step]
        drafts = self.drafts if step == "decode" else min(self.drafts, 1)
        batch = sequences * hardware.ranks_per_npu // layout.sequence_ranks
        return predict(self.c, hardware, layout, step, batch=batch, context=context, drafts=drafts)
