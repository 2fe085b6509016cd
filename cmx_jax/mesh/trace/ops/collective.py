"""One collective of a program, and what it moves.

Wire bytes are what leaves a rank in one execution, by the operation's formula for a group of `G` ranks and an
operand of `n` bytes a rank. They are those of the algorithms that move least:

    all_to_all          n (G - 1) / G         every rank keeps its own part
    all_gather          n (G - 1)             each part goes to all others
    reduce_scatter      n (G - 1) / G         a reduced part is of n / G
    all_reduce          2 n (G - 1) / G       reduce-scatter, then all-gather
    permute             n                     where a rank sends at all, to another than itself
    broadcast           n (G - 1) / G         the mean: all but one get it, passed on from rank to rank
    ragged_all_to_all   n (G - 1) / G         at most: how much is sent is data
"""

import math
from dataclasses import dataclass, field

import jax.numpy as jnp

OPS = (
    "all_to_all",
    "all_gather",
    "reduce_scatter",
    "all_reduce",
    "permute",
    "broadcast",
    "ragged_all_to_all",
)


@dataclass(frozen=True)
class Collective:
    """A collective as one rank sees it.

    Attributes:
      op: one of `OPS`.
      axes: mesh axes that it runs over, outermost first; empty if its groups are none of the mesh's.
      group_size: ranks that take part with each other.
      dtype: of the operand, as NumPy writes it.
      shape: of the operand on one rank.
      count: executions in one run of the program, loops counted; None if data decide.
      known: executions by loops of known length alone: what `count` would be if the others ran once.
      scope: `named_scope`s around it, outermost first, with `/` between.
      share: of ranks that send anything (permute).
      groups: ranks of each group, where the source has them.
      at: place in the order of the program, among products too.
      done: where it is awaited, if something else may run beside it.
      pairs: (source, target) of a permute, as ranks.
    """

    op: str
    axes: tuple[str, ...]
    group_size: int
    dtype: str
    shape: tuple[int, ...]
    count: int | None
    scope: str = ""
    share: float = 1.0
    groups: tuple[tuple[int, ...], ...] | None = None
    pairs: tuple[tuple[int, ...], ...] | None = None
    known: int = 1
    at: int = field(default=0, compare=False)
    done: int | None = field(default=None, compare=False)

    @property
    def operand_bytes(self) -> int:
        """Of one rank, in one execution."""
        return math.prod(self.shape) * jnp.dtype(self.dtype).itemsize

    @property
    def wire_bytes(self) -> float:
        """What leaves a rank in one execution, see above; the mean over ranks."""
        n, size = self.operand_bytes, self.group_size
        factor = {
            "all_gather": size - 1,
            "all_reduce": 2 * (size - 1) / size,
            "permute": self.share,
        }.get(self.op, (size - 1) / size)
        return n * factor
