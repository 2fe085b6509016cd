"""The published operator-level figures to which constants are fitted, beside the model's values.

They are from the paper's sections 7.4 and 7.5 (Tables 7 to 10), for Ascend 910C dies and for H800. The paper
has neither matrix products of an H800 nor attention over prompts on one; those are from DeepGEMM and
FlashAttention-3.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from cmx_jax.analysis.cost import constants
from cmx_jax.analysis.cost.constants import MachineModel
from cmx_jax.analysis.cost.operator_times import ExchangePhase, attention, exchange, matmul_us

GROUPS = (8, 16, 32, 64, 128, 256)
EXCHANGES: dict[
    str, dict[ExchangePhase, tuple[int, ...]]
] = {  # us, 128 tokens a rank, by group size (Table 7)
    "cloudmatrix384": {
        "dispatch": (116, 131, 133, 141, 152, 152),
        "combine": (118, 132, 146, 150, 150, 149),
    },
    "h800": {
        "dispatch": (163, 173, 182, 186, 192, 194),
        "combine": (318, 329, 350, 353, 369, 360),
    },
}
COPIES = {"cloudmatrix384": {"dispatch": 9, "combine": 8}, "h800": {"dispatch": 8, "combine": 8}}
"""Messages per token: the payload behind Table 7's GB/s has 9 for CANN's dispatch, with the shared
expert's."""
MATMULS = (  # groups, M, N, K, INT8 utilisation in % (Table 10)
    (4, 7168, 4096, 4096, 79.4),
    (4, 2048, 7168, 4096, 77.4),
    (4, 7168, 4096, 8192, 82.7),
    (4, 2048, 7168, 8192, 81.1),
    (8, 7168, 4096, 4096, 79.6),
    (8, 2048, 7168, 4096, 77.9),
)
FP8_MATMULS = (  # M, N, K, TFLOPS: DeepGEMM's first table, for H800
    (4096, 2112, 7168, 1058),
    (4096, 24576, 1536, 990),
    (4096, 32768, 512, 590),
    (4096, 7168, 16384, 1358),
    (4096, 4096, 7168, 1304),
    (4096, 7168, 2048, 1025),
)
MLA = (  # TFLOPS if bound by products, GB/s if bound by memory (Tables 8 and 9)
    ("cloudmatrix384", "CANN MLA", 246.0, 1346.0),
    ("h800", "FlashMLA", 660.0, 3000.0),
)
CAUSAL = 579
"""TFLOPS of causal attention on an H100 SXM, heads of 128, 4,096 tokens (FlashAttention-3, arXiv 2407.08608,
figure 5)."""
WIDTH = 7168
MUCH = 1e12  # FLOPs or bytes: enough for an operator's launch not to matter

Role = Literal["calibrated", "predicted"]


@dataclass(frozen=True)
class PaperRow:
    """A published figure beside the model's.

    Attributes:
      table: Table or section of the paper, or name of another source.
      name: Measured operator, system or setting.
      unit: Unit of both figures.
      published: Published figure.
      predicted: Figure of the model.
      role: `calibrated` if the figure fits a constant of the model, else `predicted`.
      group: Heading under which errors are summarised.
      note: Remark on the row, such as a reason to doubt the published figure; None for rows without remarks.
    """

    table: str
    name: str
    unit: str
    published: float
    predicted: float
    role: Role = "calibrated"
    group: str = "operators"
    note: str | None = None

    @property
    def error(self) -> float:
        """Relative error: positive where the model's figure is larger."""
        return self.predicted / self.published - 1

    def as_dict(self) -> dict[str, object]:
        """Returns the row as `cmx predict --paper --json` prints it."""
        row = {
            "table": self.table,
            "row": self.name,
            "unit": self.unit,
            "published": self.published,
            "predicted": self.predicted,
            "error": self.error,
            "role": self.role,
            "group": self.group,
        }
        return row if self.note is None else {**row, "note": self.note}


def exchange_us(machine: MachineModel, phase: ExchangePhase, ranks: int) -> float:
    """Returns the time in microseconds of a dispatch or combine of Table 7's 128 tokens a rank."""
    size = WIDTH + machine["dispatch_bytes"] if phase == "dispatch" else 2 * WIDTH
    return exchange(machine, phase, 128 * COPIES[machine.name][phase], size, ranks).us


def utilisation(machine: MachineModel, groups: int, m: int, n: int, k: int) -> float:
    """Returns the share of the INT8 peak, in %, that Table 10's grouped products reach."""
    return 2 * groups * m * n * k / matmul_us(machine, "int8", (groups, m, k, n)) / machine["int8_tops"] / 1e4


def operator_rows() -> list[PaperRow]:
    """Returns every operator-level figure beside the model's."""
    return [*_exchange_rows(), *_matmul_rows(), *_attention_rows()]


def _exchange_rows() -> Iterator[PaperRow]:
    for name, phases in EXCHANGES.items():
        for phase, times in phases.items():
            for ranks, us in zip(GROUPS, times, strict=True):
                predicted = exchange_us(constants.machine(name), phase, ranks)
                yield PaperRow("7", f"{name} {phase} EP{ranks}", "us", us, predicted)


def _matmul_rows() -> Iterator[PaperRow]:
    die, gpu = constants.machine("cloudmatrix384"), constants.machine("h800")
    for groups, m, n, k, percent in MATMULS:
        predicted = utilisation(die, groups, m, n, k)
        yield PaperRow("10", f"INT8 {groups} x {m} x {n} x {k}", "% of peak", percent, predicted)
    for m, n, k, tflops in FP8_MATMULS:
        predicted = utilisation(gpu, 1, m, n, k) / 100 * gpu["int8_tops"]
        yield PaperRow("DeepGEMM", f"FP8 {m} x {n} x {k}", "TFLOPS", tflops, predicted)


def _attention_rows() -> Iterator[PaperRow]:
    for name, kernel, tflops, gb_s in MLA:
        machine = constants.machine(name)
        launch = machine["matmul_launch_us"]
        predicted = MUCH / (attention(machine, MUCH, 0).us - launch) / 1e6
        yield PaperRow("8", kernel, "TFLOPS", tflops, predicted)
        predicted = MUCH / (attention(machine, 0, MUCH).us - launch) / 1e3
        yield PaperRow("9", kernel, "GB/s", gb_s, predicted)
    h100 = constants.machine("h100")
    us = attention(h100, MUCH, 0, kernel="prefill_tflops").us - h100["matmul_launch_us"]
    yield PaperRow("FA3", "causal, 4,096 tokens", "TFLOPS", CAUSAL, MUCH / us / 1e6)
