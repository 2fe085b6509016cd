"""Time of one operator on one rank, and of reads of the memory pool. Times are in microseconds.

A kernel's time is its launch plus the longest of its computation, its memory traffic and its network traffic.
`Share` is the part of a rank's cores and memory that the kernel has. Memory bandwidth does not depend on the
number of cores: a matrix core keeps hundreds of KB of loads in flight, so a part of the cores can draw all of
it, and streams that do so at the same time slow each other down (`analysis/cost/overlap.py`).
"""

import math
from dataclasses import dataclass
from typing import Literal

from cmx_jax.analysis.cost.constants import MachineModel
from cmx_jax.mesh.supernode import Path

Bound = Literal["compute", "memory", "network", "vector cores", "launch"]
ExchangePhase = Literal["dispatch", "combine"]
PEAKS = {"int8": "int8_tops", "bfloat16": "bf16_tflops", "float16": "bf16_tflops"}
POOL = Path(read_gb_s=147, write_gb_s=107, read_us=1.7, write_us=1.9)
"""One die's path to the memory pool, the CPUs' DRAM that NPUs read and write over UB (section 4.4.1):
Table 1, NPU to CPU across nodes."""


@dataclass(frozen=True)
class Cost:
    """Cost of one kernel.

    Attributes:
      us: Duration in microseconds.
      bound: Phase that accounts for most of the duration.
      memory: Time in microseconds for which the kernel keeps memory busy.
    """

    us: float
    bound: Bound
    memory: float


@dataclass(frozen=True)
class Share:
    """Part of a rank that an operator has.

    Attributes:
      cores: Fraction of the rank's cores.
      memory: Fraction of the rank's memory bandwidth.
    """

    cores: float = 1.0
    memory: float = 1.0


ALL = Share()


def peak(machine: MachineModel, dtype: str) -> float:
    """Returns the peak number of operations per microsecond, in millions."""
    return machine[PEAKS.get(dtype, "fp32_tflops")]


def kernel_cost(launch: float, **phases: float) -> Cost:
    """Returns the cost of a kernel whose phases overlap: `launch` plus the longest phase.

    Args:
      launch: Microseconds that starting the kernel takes.
      **phases: Microseconds of each phase. A keyword is the phase's `Bound`, with underscores for spaces.
    """
    name = max(phases, key=lambda phase: phases[phase])
    bound = "launch" if launch > phases[name] else name.replace("_", " ")
    return Cost(launch + phases[name], bound, phases.get("memory", 0.0))  # type: ignore[arg-type]


def matmul_us(machine: MachineModel, dtype: str, shape: tuple[float, ...], cores: float = 1.0) -> float:
    """Returns the computing time of `[batch, m, k] x [batch, k, n]`.

    Cores take tiles of `tile_rows x tile_columns` in turn, so the last turn may be partly idle; if there are
    fewer tiles than cores, kernels cut them finer. A tile costs its depth `k`, and a fill for its start and
    end. The fill is given as depth in INT8, and takes the same time for every type. A last tile with fewer
    rows costs only those, in multiples of 16.
    """
    batch, m, k, n = shape
    rows, columns, workers = machine["tile_rows"], machine["tile_columns"], machine["cores"] * cores
    high, wide = math.ceil(m / 16) * 16, math.ceil(n / columns)
    tiles = batch * math.ceil(m / rows) * wide
    turns = math.ceil(tiles / workers) if tiles > workers else tiles / workers
    mean_rows = high / math.ceil(m / rows)  # per tile
    fill = machine["matmul_fill"] * peak(machine, dtype) / peak(machine, "int8")
    core_peak = peak(machine, dtype) * machine["matmul_efficiency"] / machine["cores"]
    return turns * 2 * mean_rows * columns * (k + fill) / (core_peak * 1e6)


def matmul(
    machine: MachineModel,
    dtype: str,
    shape: tuple[float, ...],
    moved: float,
    share: Share = ALL,
    launch: bool = True,
) -> Cost:
    """Returns the cost of a product with weights; with few rows, reading the weights bounds it.

    Args:
      machine: Machine that runs the product.
      dtype: Type of the operands.
      shape: Shape of the product, `(batch, m, k, n)`.
      moved: Bytes of operands and result.
      share: Part of the rank that the product has.
      launch: Count a kernel launch; False for a product fused into the kernel before it.
    """
    read = moved / (machine["hbm_gb_s"] * machine["matmul_memory"] * share.memory * 1e3)
    start = machine["matmul_launch_us"] if launch else 0.0
    return kernel_cost(start, compute=matmul_us(machine, dtype, shape, share.cores), memory=read)


def attention(
    machine: MachineModel, flops: float, moved: float, share: Share = ALL, kernel: str = "attention_tflops"
) -> Cost:
    """Returns the cost of scores, softmax and sum as one kernel.

    It is bound by its products, or by reading keys and values.

    Args:
      machine: Machine that runs the kernel.
      flops: Operations of the products.
      moved: Bytes read and written.
      share: Part of the rank that the kernel has.
      kernel: Constant with the speed of the products; `prefill_tflops` for whole prompts.
    """
    compute = flops / (machine[kernel] * share.cores * 1e6)
    read = moved / (machine["hbm_gb_s"] * machine["attention_memory"] * share.memory * 1e3)
    return kernel_cost(machine["matmul_launch_us"], compute=compute, memory=read)


def vector(machine: MachineModel, moved: float, share: Share = ALL) -> Cost:
    """Returns the cost of a norm, activation or rounding that reads and writes `moved` bytes.

    Its computation takes next to no time.
    """
    read = moved / (machine["hbm_gb_s"] * machine["vector_memory"] * share.memory * 1e3)
    return kernel_cost(machine["vector_launch_us"], memory=read)


def collective(machine: MachineModel, wire: float) -> Cost:
    """Returns the cost of a collective that sends `wire` bytes from each rank."""
    start = machine["exchange_launch_us"] + machine["network_us"]
    return kernel_cost(start, network=wire / (machine["network_gb_s"] * 1e3))


PASSES = 3
"""Number of times that a message passes through memory: dispatch writes it on arrival, reads it and places
it; combine reads it, writes it on arrival and gathers it."""


@dataclass(frozen=True)
class ExchangeCost:
    """Cost of a dispatch or combine by its parts, all in microseconds.

    Attributes:
      start: Launch and latency.
      wire: Transfer over the network.
      cores: Work of the vector cores that drive the exchange.
      memory: Time for which the exchange keeps memory busy.
    """

    start: float
    wire: float
    cores: float
    memory: float

    @property
    def us(self) -> float:
        """Total duration."""
        return self.start + self.wire + self.cores


def exchange(
    machine: MachineModel,
    phase: ExchangePhase,
    messages: float,
    size: float,
    ranks: int,
    cores: float = 1.0,
) -> ExchangeCost:
    """Returns the cost of a dispatch or combine (section 4.2.1).

    Messages to near ranks do not cross the network; all others cost the same. This is how measured times grow
    with the size of the group and then level off (Table 7). Of the time per message, the network's part is
    what it needs at Table 1's bandwidth. The rest is the work of the cores, which pack, place and gather, and
    grows when there are fewer of them.

    Args:
      machine: Machine that runs the exchange.
      phase: Direction of the exchange.
      messages: Number of messages that a rank sends.
      size: Bytes per message.
      ranks: Number of ranks in the group.
      cores: Fraction of the rank's cores.
    """
    remote = messages * max(ranks - machine["near_ranks"], 0) / ranks
    wire = size / machine["network_gb_s"] / 1e3
    work = max(machine[f"{phase}_ns"] / 1e3 - wire, 0.0)
    if machine.kind == "gpu":  # low-latency kernels use no cores: all of the time is the network's
        wire, work = machine[f"{phase}_ns"] / 1e3, 0.0
    latency = machine["node_us"] if ranks <= machine.ranks_per_node else machine["network_us"]
    start = machine["exchange_launch_us"] + machine["flights"] * latency
    memory = PASSES * messages * size / (machine["hbm_gb_s"] * machine["vector_memory"] * 1e3)
    return ExchangeCost(start, remote * wire, remote * work / cores, memory)


def exchange_by_node(
    machine: MachineModel, phase: ExchangePhase, tokens: float, size: float, reached: float
) -> ExchangeCost:
    """Returns the cost of GPUs' exchange kernels for many tokens.

    A token crosses the network once to each node that it needs, and spreads there over NVLink.

    Args:
      machine: Machine that runs the exchange.
      phase: Direction of the exchange.
      tokens: Number of tokens per rank.
      size: Bytes per token.
      reached: Number of nodes that a token goes to, on average.
    """
    wire = tokens * reached * size / (machine[f"normal_{phase}_gb_s"] * 1e3)
    start = machine["exchange_launch_us"] + machine["flights"] * machine["network_us"]
    return ExchangeCost(start, wire, 0.0, 0.0)


def pool_read_s(size: float, dies: int = 1) -> float:
    """Returns the seconds in which `dies` dies together read `size` bytes of the memory pool.

    Each die reads an equal part. CPUs are taken to be fast enough.
    """
    return POOL.read_us / 1e6 + size / dies / (POOL.read_gb_s * 1e9)
