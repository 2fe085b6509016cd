"""What a reader finds in a program, and where it is while it reads."""

import itertools
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field, replace

from cmx_jax.mesh.trace.ops.collective import Collective


@dataclass(frozen=True)
class Product:
    """A matmul or convolution as one rank sees it: type of its operands, operations and bytes once; `at` is
    its place in the order of the program, among collectives too; `shape` of a matmul `(batch, m, k, n)`."""

    dtype: str
    flops: int
    bytes: int
    count: int | None
    scope: str
    known: int
    at: int = field(default=0, compare=False)
    shape: tuple[int, ...] = ()


@dataclass
class Found:
    """What a program holds.

    Attributes:
      collectives: Collectives in the order of the program.
      products: Matrix products and convolutions in the order of the program.
      axes: Sizes of the mesh axes of its `shard_map`s and explicit shardings.
      notes: What is uncertain.
      arguments: Bytes that a rank gives to the program, or to its first `shard_map`; 0 if unknown.
      implied: Operations on explicitly sharded arrays for which the compiler inserts collectives, counted.
      whole: Operations that the compiler splits over some mesh axis, counted; their sizes here are those of
        all ranks along that axis together.
      order: Counter of places in the program.
    """

    collectives: list[Collective] = field(default_factory=list)
    products: list[Product] = field(default_factory=list)
    axes: dict[str, int] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    arguments: int = 0
    implied: Counter[str] = field(default_factory=Counter)
    whole: Counter[str] = field(default_factory=Counter)
    order: Iterator[int] = field(default_factory=itertools.count, repr=False)


@dataclass(frozen=True)
class At:
    """Where a reader is in a program.

    Attributes:
      count: Executions, or None where data decide.
      known: Executions by loops of known length alone.
      scope: `named_scope`s, outermost first, with `/` between.
      axes: Sizes of the axes of the mesh of the `shard_map` around.
      manual: Mesh axes along which sizes are those of one rank (StableHLO).
    """

    count: int | None = 1
    known: int = 1
    scope: str = ""
    axes: tuple[tuple[str, int], ...] = ()
    manual: tuple[str, ...] = ()

    def times(self, n: int | None) -> "At":
        """In a loop (None: data decide how often it runs)."""
        count = None if n is None or self.count is None else self.count * n
        return replace(self, count=count, known=self.known * (1 if n is None else n))


def merge_branches(each: list[Found], found: Found) -> None:
    """Adds what every branch of a condition holds; what all have alike is sure."""
    same = all(part.collectives == each[0].collectives for part in each)
    for i, part in enumerate(each):
        found.axes |= part.axes
        found.implied += part.implied
        found.whole += part.whole
        if same and i:
            continue
        collectives = part.collectives if same else [replace(c, count=None) for c in part.collectives]
        found.collectives += collectives
    alike = all(part.products == each[0].products for part in each)
    for part in each[:1] if alike else each:
        found.products += part.products if alike else [replace(p, count=None) for p in part.products]
