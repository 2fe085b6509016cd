"""The result of reading a program, and the state of a reader on its way through it."""

import itertools
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

from cmx_jax.mesh.groups import Axes
from cmx_jax.mesh.trace.ops.collective import Collective


@dataclass(frozen=True)
class Product:
    """A matrix product or convolution as one rank sees it.

    Attributes:
      dtype: Type of the operands, by NumPy's name.
      flops: Operations in one execution.
      bytes: Bytes of operands and result in one execution.
      count: Executions in one run of the program, loops counted; None if data decide.
      scope: Names of the enclosing `named_scope`s, outermost first, separated by `/`.
      known: Executions counting only loops of known length.
      position: Position in the program, counted among collectives too.
      shape: Sizes `(batch, m, k, n)` of a matrix product, where the source has them.
    """

    dtype: str
    flops: int
    bytes: int
    count: int | None
    scope: str
    known: int
    position: int = field(default=0, compare=False)
    shape: tuple[int, ...] = ()


@dataclass
class Contents:
    """The collectives and products of a program.

    Attributes:
      collectives: Collectives in the order of the program.
      products: Matrix products and convolutions in the order of the program.
      axes: Sizes of the mesh axes of its `shard_map`s and explicit shardings.
      meshes: Different meshes of its `shard_map`s, in the order in which they appear.
      unknown: Number of operations, by what is known of them, that name mesh axes and are not understood.
      notes: Sentences on what is uncertain.
      arguments: Bytes that a rank passes to the program, or to its first `shard_map`; 0 if unknown.
      implied: Number of operations, by name, whose explicit shardings make the compiler insert collectives.
      unsplit: Number of operations, by name, that the compiler will split over some mesh axis; their sizes
        here are those of all ranks along that axis together.
      order: Counter of positions in the program.
    """

    collectives: list[Collective] = field(default_factory=list)
    products: list[Product] = field(default_factory=list)
    axes: dict[str, int] = field(default_factory=dict)
    meshes: list[Axes] = field(default_factory=list)
    unknown: Counter[str] = field(default_factory=Counter)
    notes: list[str] = field(default_factory=list)
    arguments: int = 0
    implied: Counter[str] = field(default_factory=Counter)
    unsplit: Counter[str] = field(default_factory=Counter)
    order: Iterator[int] = field(default_factory=itertools.count, repr=False)

    @property
    def operations(self) -> list[Collective | Product]:
        """The collectives, then the products."""
        return [*self.collectives, *self.products]


@dataclass(frozen=True)
class Context:
    """The loops, scopes and meshes around an operation.

    Attributes:
      count: Executions; None if data decide.
      known: Executions counting only loops of known length.
      scope: Names of the enclosing `named_scope`s, outermost first, separated by `/`.
      axes: Names and sizes of the mesh axes of the enclosing `shard_map`, or of the whole program.
      manual: Mesh axes along which sizes are those of one rank.
    """

    count: int | None = 1
    known: int = 1
    scope: str = ""
    axes: tuple[tuple[str, int], ...] = ()
    manual: tuple[str, ...] = ()

    @property
    def auto(self) -> list[str]:
        """Mesh axes of more than one rank over which the compiler splits operations."""
        return [name for name, size in self.axes if size > 1 and name not in self.manual]

    def times(self, n: int | None) -> "Context":
        """Returns the context inside a loop that runs `n` times (None: data decide)."""
        count = None if n is None or self.count is None else self.count * n
        return replace(self, count=count, known=self.known * (1 if n is None else n))


def over(name: str, axes: Sequence[str]) -> str:
    """Returns the name of an operation with the mesh axes that it concerns, if any are known."""
    return f"{name} over {', '.join(axes)}" if axes else name


def merge_branches(branches: list[Contents], contents: Contents) -> None:
    """Adds the branches of a condition to the contents.

    If all branches have the same collectives, these are added once, with their counts; otherwise those of
    every branch are added with count None, since data decide. Likewise for products.
    """
    first = branches[0]
    same_collectives = all(branch.collectives == first.collectives for branch in branches)
    same_products = all(branch.products == first.products for branch in branches)
    for i, branch in enumerate(branches):
        contents.axes |= branch.axes
        contents.implied += branch.implied
        contents.unsplit += branch.unsplit
        contents.unknown += branch.unknown
        contents.meshes += [mesh for mesh in branch.meshes if mesh not in contents.meshes]
        if same_collectives and not i:
            contents.collectives += branch.collectives
        elif not same_collectives:
            contents.collectives += [replace(c, count=None) for c in branch.collectives]
        if same_products and not i:
            contents.products += branch.products
        elif not same_products:
            contents.products += [replace(p, count=None) for p in branch.products]
