"""The load that a deployment has to serve, and the machine and limits it has for that."""

import math
from dataclasses import dataclass

from cmx_jax.analysis.cost import constants
from cmx_jax.analysis.cost.constants import MachineModel
from cmx_jax.errors import CmxError
from cmx_jax.model.config import ModelConfig


@dataclass(frozen=True)
class Workload:
    """Lengths of the requests to a deployment, and their service-level objectives.

    Attributes:
      prompt: Number of tokens of a prompt.
      output: Number of tokens of its answer.
      slo_ttft_ms: Longest time to the first token.
      slo_tpot_ms: Longest time per further output token.

    Raises:
      CmxError: A number is not positive, or the output is shorter than 2 tokens.
    """

    prompt: int
    output: int
    slo_ttft_ms: float
    slo_tpot_ms: float

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if not 0 < value < math.inf:
                raise CmxError(f"{name} is {value:g}, expected more than 0")
        if self.output < 2:
            raise CmxError(f"output is {self.output}, expected at least 2 tokens: the first is prefill's")

    @property
    def context(self) -> int:
        """Number of tokens that a decode step attends to, on average."""
        return self.prompt + self.output // 2

    def slo_ms(self, step: str) -> float:
        """Returns the objective of an instance: time to the first token (prefill), or per token (decode)."""
        return self.slo_ttft_ms if step == "prefill" else self.slo_tpot_ms


@dataclass(frozen=True)
class PlanRequest:
    """A model, the workload to serve with it, and the machine to serve it on.

    Attributes:
      config: Configuration of the model.
      workload: Lengths of the requests, and their objectives.
      hardware: Name from `cmx_jax.analysis.cost.constants.MACHINES`.
      npus: Number of NPUs available.
      rate: Requests per second to serve; None to serve as many as possible.
      mtp_acceptance: Probability that a draft is right if all drafts before it were.

    Raises:
      CmxError: The hardware is unknown, or the number of NPUs or the rate is not positive.
    """

    config: ModelConfig
    workload: Workload
    hardware: str = "cloudmatrix384"
    npus: int = 384
    rate: float | None = None
    mtp_acceptance: float = 0.7

    def __post_init__(self) -> None:
        constants.machine(self.hardware)
        if self.npus < 1 or (self.rate is not None and not 0 < self.rate < math.inf):
            raise CmxError(f"npus is {self.npus} and rate {self.rate}, expected more than 0")

    @property
    def machine(self) -> MachineModel:
        """Machine called `hardware`."""
        return constants.machine(self.hardware)
