"""Configuration of a simulated supernode: pools of equal instances."""

import math
from dataclasses import dataclass, field

from cmx_jax.errors import CmxError
from cmx_jax.serving.scheduling.allocator import Capacity


@dataclass(frozen=True, kw_only=True)
class InstancePool:
    """Equal instances.

    Attributes:
      instances: Number of instances.
      npus: Number of NPUs per instance.
      ranks: Number of ranks per instance that have sequences of their own.
      sharing: Number of ranks that hold each of these sequences together (section 4.3.1).
      capacity: Sequences, pages and prefill tokens of one rank.
    """

    instances: int = 1
    npus: int = 1
    ranks: int = 1
    sharing: int = 1
    capacity: Capacity = field(default_factory=Capacity)

    def __post_init__(self) -> None:
        capacity = {f"capacity.{name}": value for name, value in vars(self.capacity).items()}
        for name, value in {**vars(self), **capacity}.items():
            if isinstance(value, int) and value < 1:
                raise CmxError(f"{name} is {value}, expected at least 1")


@dataclass(frozen=True, kw_only=True)
class SimulatedDeployment:
    """Instances and prefix cache of a supernode.

    Attributes:
      prefill: Instances that prefill prompts.
      decode: Instances that generate; None: the prefill instances do so.
      acceptance: Mean number of accepted drafts per decode step.
      prefix_blocks: Size of the prefix cache, in blocks of 512 tokens.
      one_host: Flag; instances share one machine and step in turn, like those of `Engine`.
    """

    prefill: InstancePool
    decode: InstancePool | None
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
