"""One collective of a program, and the bytes that it moves.

Wire bytes are the bytes that leave a rank in one execution, by the operation's formula for a group of `G`
ranks and an operand of `n` bytes per rank. The formulas are those of the algorithms that move least:

    all_to_all          n (G - 1) / G         every rank keeps its own part
    all_gather          n (G - 1)             each part goes to all other ranks
    reduce_scatter      n (G - 1) / G         a reduced part has n / G bytes
    all_reduce          2 n (G - 1) / G       reduce-scatter, then all-gather
    permute             n                     if the rank sends to another rank than itself
    broadcast           n (G - 1) / G         the mean: passed on from rank to rank, the last sends nothing
    ragged_all_to_all   n (G - 1) / G         at most: data decide how much is sent
    remote_copy         n                     of a Pallas kernel, to a device that the kernel chooses

Where groups have different sizes, or leave ranks out, wire bytes are the mean over all ranks of the mesh.
"""

from dataclasses import dataclass, field

from cmx_jax.mesh.trace.ops.sizes import array_bytes

OPS = (
    "all_to_all",
    "all_gather",
    "reduce_scatter",
    "all_reduce",
    "permute",
    "broadcast",
    "ragged_all_to_all",
    "remote_copy",
)


@dataclass(frozen=True)
class Collective:
    """A collective as one rank sees it.

    Attributes:
      op: Operation, one of `OPS`.
      axes: Mesh axes that it runs over, outermost first; empty if its groups are not those of mesh axes.
      group_size: Number of ranks in a group, the largest if they differ.
      dtype: Type of the operand, by NumPy's name.
      shape: Shape of the operand on one rank.
      count: Executions in one run of the program, loops counted; None if data decide.
      known: Executions counting only loops of known length: the value of `count` if all others ran once.
      scope: Names of the enclosing `named_scope`s, outermost first, separated by `/`.
      share: Share of the ranks that send anything (permute), or that are in a group.
      groups: Ranks of each group; None where the source does not list them.
      position: Position in the program, counted among products too.
      awaited_at: Position at which it is awaited, if it is asynchronous; None if the program blocks on it.
      pairs: Pairs (source, target) of ranks (permute); None for other operations.

    Example:
      >>> gather = Collective("all_gather", ("ep",), 4, "float32", (8, 2), count=1)
      >>> gather.operand_bytes, gather.wire_bytes
      (64, 192.0)
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
    position: int = field(default=0, compare=False)
    awaited_at: int | None = field(default=None, compare=False)

    @property
    def operand_bytes(self) -> int:
        """Bytes of the operand on one rank, in one execution."""
        return array_bytes(self.shape, self.dtype)

    @property
    def wire_bytes(self) -> float:
        """Bytes that leave a rank in one execution, by the formulas above; the mean over ranks."""
        if self.op in ("permute", "remote_copy"):
            return self.operand_bytes * self.share
        sizes = {len(group) for group in self.groups or ()}
        if len(sizes) < 2:
            return self.operand_bytes * self._factor(self.group_size) * self.share
        ranks = sum(map(len, self.groups or ()))
        total = sum(len(group) * self._factor(len(group)) for group in self.groups or ())
        return self.operand_bytes * total / ranks * self.share

    def _factor(self, size: int) -> float:
        """Returns the wire bytes of a rank in a group of `size`, as a part of its operand."""
        factors = {"all_gather": float(size - 1), "all_reduce": 2 * (size - 1) / size}
        return factors.get(self.op, (size - 1) / size)
