"""What runs on a simulated supernode: pools of equal instances."""

import math
from dataclasses import dataclass, field

from cmx_jax.errors import CmxError
from cmx_jax.serving.scheduling.allocator import Capacity


@dataclass(frozen=True, kw_only=True)
class Pool:
    """Equal instances.

    Attributes:
      instances: how many.
      npus: of each.
      ranks: of each that have sequences of their own.
      sharing: ranks that hold each of these sequences together (section 4.3.1).
      capacity: of a rank.
    """

    instances: int = 1
    npus: int = 1
    ranks: int = 1
    sharing: int = 1
    capacity: Capacity = field(default_factory=Capacity)

    def __post_init__(self) -> None:
        room = {f"capacity.{name}": value for name, value in vars(self.capacity).items()}
        for name, value in {**vars(self), **room}.items():
            if isinstance(value, int) and value < 1:
                raise CmxError(f"{name} is {value}, expected at least 1")


@dataclass(frozen=True, kw_only=True)
class Deployment:
    """What runs on a supernode.

    Attributes:
      prefill: the instances that take prompts.
      decode: those that continue them; None: the same ones.
      acceptance: drafts of a decode step that are right on average.
      prefix_blocks: of 512 tokens, that the prefix cache holds.
      one_host: all instances share one machine and step in turn, as those of `Engine` do.
    """

    prefill: Pool
    decode: Pool | None
    acceptance: float = 0.0
    prefix_blocks: int = 0
    one_host: bool = False

    def __post_init__(self) -> None:
        if not 0 <= self.acceptance < math.inf or self.prefix_blocks < 0:
            raise CmxError(
                f"acceptance is {self.acceptance:g} and prefix_blocks {self.prefix_blocks}, "
                "expected zero or more"
            )

    @property
    def npus(self) -> int:
        return sum(pool.instances * pool.npus for pool in (self.prefill, self.decode) if pool)
