"""Step times as `cmx predict` has them: traced programs of a deployment's layouts, on a grid.

A grid has the points 1, 2, 3, 4, 6, 8, 12, 16, ... (`PARTS` to an octave) of a unit. Each is predicted when
it is first asked for; between two of them is a straight line.

* *decode*: over sequences of a rank and, an octave apart, their tokens. Fewer sequences than there are
  microbatches take what one in each takes.
* *prefill*: over tokens of a row, as short prompts. To these attention adds what it takes for each pair of
  tokens of which one sees the other, and the pairs are counted. A chunk takes its own part of its prompt's
  pairs; that the keys and values of its past are expanded again is left out.

Between the points times are within 3 % of what is predicted there directly, and within 1 % on average.
"""

from functools import cached_property
from itertools import count
from typing import Any

from cmx_jax.analysis.cost.constants import machine
from cmx_jax.analysis.cost.operators import pool_read_s
from cmx_jax.analysis.predict.candidates import transfer_ms
from cmx_jax.analysis.predict.predict import Prediction, predict
from cmx_jax.analysis.simulate.deployment import Pool
from cmx_jax.analysis.simulate.grid import around, straight
from cmx_jax.analysis.trace.memory import page_bytes
from cmx_jax.analysis.trace.steps import PAGE_WIDTH
from cmx_jax.errors import CmxError
from cmx_jax.mesh.layout import Layout
from cmx_jax.model.config import ModelConfig
from cmx_jax.serving.scheduling.packing import Piece
from cmx_jax.serving.scheduling.ranks import Capacity

PARTS = 2
CONTEXT = 2 * PAGE_WIDTH  # tokens: the shortest at which decode is predicted
LONG = 8192  # tokens of a prompt that attention takes long for, or the model's longest
SHORTER = 8  # times: one that it does not


class Predicted:
    """A `StepTimes` of one prefill and one decode layout.

    Args:
      c: the model.
      hardware: a name in `cmx_jax.analysis.cost.constants.MACHINES`.
      prefill: layout of an instance that takes prompts.
      decode: of one that continues them.
      drafts: MTP drafts of a decode step; with any of them prefill runs the MTP layer.
      context: at which all decode steps are predicted; None: at theirs.

    Raises:
      CmxError: what `predict` says of the model, the hardware or a layout.
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
        self.c, self.on, self.drafts, self.context = c, machine(hardware), drafts, context
        self.layouts = {"prefill": prefill, "decode": decode}
        # a point of the grid need not fit: what runs is held to `pool`
        self._boundless = self.on.scaled("hbm_gb", 1e6)
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
        return transfer_ms(self.c, self.on, 1, self.drafts > 0) / 1e3

    def fetch(self, tokens: int) -> float:
        """One die reads them from the memory pool over UB (Table 1)."""
        if self.on.kind != "ascend":
            raise CmxError(f"{self.on.name} has no memory pool, expected cloudmatrix384 for a prefix cache")
        return pool_read_s(page_bytes(self.c, tokens, "auto", self.drafts > 0))

    def acceptance(self, chance: float) -> float:
        """Drafts of a step that are right on average, if one is with this chance after another that was.

        Raises:
          CmxError: that is no chance.
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
    ) -> Pool:
        """Instances of one step's layout, with the room that their memory leaves.

        Args:
          step: `prefill` or `decode`.
          instances: how many.
          sequences: of a rank that decodes.
          budget: tokens of a prefill step's row.
          tokens: that a rank (or ranks that share sequences) caches; None: what memory has room for.

        Raises:
          CmxError: weights, mailboxes and one sequence need more than there is.
        """
        layout, shared = self.layouts[step], self.layouts[step].sequence_ranks
        if tokens is None:
            if step == "prefill":
                needed = self._found(step, *self._prompts(max(budget, self._least)), self.on).memory_gb
            else:
                needed = self._found(step, sequences, PAGE_WIDTH, self.on).memory_gb
            left = self.on["hbm_gb"] - needed.weights - needed.mailboxes
            tokens = int(left * 1e9 * shared / page_bytes(self.c, 1, "auto", self.drafts > 0))
        room = Capacity(
            sequences=sequences,
            pages=tokens // PAGE_WIDTH,
            page_width=PAGE_WIDTH,
            max_num_batched_tokens=budget,
        )
        npus = layout.ranks // self.on.ranks_per_npu
        return Pool(instances=instances, npus=npus, ranks=layout.data_ranks, sharing=shared, capacity=room)

    def _line(self, sequences: int, context: float) -> tuple[float, float, float]:
        """Where an octave of tokens begins, what a decode step takes there, and how much more for a token."""

        def of(length: int) -> float:
            ends = around(sequences, self._units["decode"], PARTS)
            return straight(sequences, ends, lambda n: self._ms("decode", n, length)) / 1e3

        if self.context is not None:
            return context, of(self.context), 0.0
        near, far = around(context, CONTEXT, 1, self.c.max_position_embeddings)
        return near, of(near), (of(far) - of(near)) / max(far - near, 1)

    def _row_ms(self, row: list[Piece]) -> float:
        tokens = sum([p.stop - p.start for p in row])
        pairs = sum([(p.stop**2 - p.start**2) / 2 for p in row])
        return straight(tokens, around(tokens, self._least, PARTS), self._plain_ms) + pairs * self._pair_ms

    def _plain_ms(self, tokens: int) -> float:
        """Of a prefill step of the grid, without attention."""
        sequences, length = self._prompts(tokens)
        return self._ms("prefill", sequences, length) - self._pair_ms * tokens * length / 2

    @cached_property
    def _pair_ms(self) -> float:
        """Of attention, for a pair of tokens: as many tokens in long prompts and in short ones."""
        few, long, short = self._units["prefill"], self._long, self._long // SHORTER
        ms = self._ms("prefill", few, long) - self._ms("prefill", few * SHORTER, short)
        return ms / (few * long * (long - short) / 2)

    @cached_property
    def _long(self) -> int:
        return min(LONG, self.c.max_position_embeddings)

    @cached_property
    def _least(self) -> int:
        """Tokens of the shortest prefill step that is predicted."""
        shared = self.layouts["prefill"].sequence_ranks
        return self._units["prefill"] * shared * max(32 // shared, 1)

    def _prompts(self, tokens: int) -> tuple[int, int]:
        """So many sequences, so long, as make a point of the grid."""
        unit = self._units["prefill"]
        sequences = unit * max(tokens // (unit * self._long // SHORTER), 1)
        return sequences, tokens // sequences

    def _unit(self, layout: Layout) -> int:
        """The fewest sequences of a data rank that make whole NPUs and microbatches."""
        ranks, shared = self.on.ranks_per_npu, layout.sequence_ranks
        each = (batch * shared // ranks for batch in count(1) if not batch * shared % ranks)
        return next(n for n in each if not n % layout.microbatches)

    def _ms(self, step: str, sequences: int, context: int) -> float:
        key = (step, sequences, context)
        if key not in self._known:
            self._known[key] = self._found(*key, self._boundless).step_ms
        return self._known[key]

    def _found(self, step: str, sequences: int, context: int, on: Any) -> Prediction:
        layout = self.layouts[step]
        drafts = self.drafts if step == "decode" else min(self.drafts, 1)
        batch = sequences * on.ranks_per_npu // layout.sequence_ranks
        return predict(self.c, on, layout, step, batch=batch, context=context, drafts=drafts)
