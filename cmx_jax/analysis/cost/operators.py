"""The time of one operator on one rank. Times are in microseconds.

A kernel's time is what it costs to start and the longest of what it computes, reads, and sends. `share` is
the part of a rank's cores that it has. Memory serves whoever asks: a matrix core holds hundreds of KB of
loads under way, so that a part of the cores can draw all of its bandwidth, and streams that do so at once
are slowed (`analysis/cost/overlap.py`).
"""

import math
from dataclasses import dataclass
from typing import Literal

from cmx_jax.analysis.cost.constants import Machine

Bound = Literal["compute", "memory", "network", "vector cores", "launch"]
PEAKS = {"int8": "int8_tops", "bfloat16": "bf16_tflops", "float16": "bf16_tflops"}


@dataclass(frozen=True)
class Cost:
    """Time of an operator, what is the most of it, and for how much of it memory is busy."""

    us: float
    bound: Bound
    memory: float


@dataclass(frozen=True)
class Share:
    """What an operator has of a rank: part of its cores, and of the bandwidth of its memory."""

    cores: float = 1.0
    memory: float = 1.0


ALL = Share()


def peak(machine: Machine, dtype: str) -> float:
    """Operations of a microsecond, in millions."""
    return machine[PEAKS.get(dtype, "fp32_tflops")]


def longest(launch: float, **parts: float) -> Cost:
    """`launch` and the longest part; the bound is what takes most."""
    name = max(parts, key=lambda part: parts[part])
    bound = "launch" if launch > parts[name] else name.replace("_", " ")
    return Cost(launch + parts[name], bound, parts.get("memory", 0.0))  # type: ignore[arg-type]


def matmul_us(machine: Machine, dtype: str, shape: tuple[float, ...], cores: float = 1.0) -> float:
    """Computing `[batch, m, k] x [batch, k, n]`.

    Cores take tiles of `tile_rows x tile_columns` in turn, so the last turn may be partly idle; where tiles
    are fewer than cores, kernels cut them finer. A tile costs its depth `k`, and a fill for its start and
    end, given as depth in INT8: a time, whatever the type. A last tile with fewer rows costs those, 16 at a
    time.
    """
    batch, m, k, n = shape
    rows, columns, workers = machine["tile_rows"], machine["tile_columns"], machine["cores"] * cores
    high, wide = math.ceil(m / 16) * 16, math.ceil(n / columns)
    tiles = batch * math.ceil(m / rows) * wide
    turns = math.ceil(tiles / workers) if tiles > workers else tiles / workers
    tall = high / math.ceil(m / rows)  # rows of a tile, on average
    fill = machine["matmul_fill"] * peak(machine, dtype) / peak(machine, "int8")
    a_core = peak(machine, dtype) * machine["matmul_efficiency"] / machine["cores"]
    return turns * 2 * tall * columns * (k + fill) / (a_core * 1e6)


def matmul(
    machine: Machine,
    dtype: str,
    shape: tuple[float, ...],
    moved: float,
    share: Share = ALL,
    launch: bool = True,
) -> Cost:
    """A product with weights; `moved`: bytes of operands and result. Few rows leave it to reading weights."""
    read = moved / (machine["hbm_gb_s"] * machine["matmul_memory"] * share.memory * 1e3)
    start = machine["matmul_launch_us"] if launch else 0.0
    return longest(start, compute=matmul_us(machine, dtype, shape, share.cores), memory=read)


def attention(
    machine: Machine, flops: float, moved: float, share: Share = ALL, kernel: str = "attention_tflops"
) -> Cost:
    """Scores, softmax and sum as one kernel: bound by its products or by reading keys and values. `kernel`:
    the constant that says what its products reach, `prefill_tflops` for whole prompts."""
    compute = flops / (machine[kernel] * share.cores * 1e6)
    read = moved / (machine["hbm_gb_s"] * machine["attention_memory"] * share.memory * 1e3)
    return longest(machine["matmul_launch_us"], compute=compute, memory=read)


def vector(machine: Machine, moved: float, share: Share = ALL) -> Cost:
    """Norms, activations, rounding: read and write memory, and compute next to nothing."""
    read = moved / (machine["hbm_gb_s"] * machine["vector_memory"] * share.memory * 1e3)
    return longest(machine["vector_launch_us"], memory=read)


def collective(machine: Machine, wire: float) -> Cost:
    """A collective of which `wire` bytes leave the rank."""
    start = machine["exchange_launch_us"] + machine["network_us"]
    return longest(start, network=wire / (machine["network_gb_s"] * 1e3))


PASSES = 3
"""How often a message passes memory: dispatch lands it, reads and places it; combine reads, lands,
gathers."""


@dataclass(frozen=True)
class Exchanged:
    """A dispatch or combine in its parts: the network's, and that of the vector cores which drive it;
    `memory`: for how long memory is busy with it."""

    start: float
    wire: float
    cores: float
    memory: float

    @property
    def us(self) -> float:
        return self.start + self.wire + self.cores


def exchange(
    machine: Machine,
    which: Literal["dispatch", "combine"],
    messages: float,
    size: float,
    ranks: int,
    cores: float = 1.0,
) -> Exchanged:
    """Dispatch or combine of `messages` messages of `size` bytes over `ranks` ranks (section 4.2.1).

    Messages to ranks that are near do not cross the network, all others cost the same: that is how measured
    times grow with the group and then no more (Table 7). Of a message's time what the network needs at the
    bandwidth of Table 1 is the network's; the rest is the cores', which pack, place and gather, and grows
    when they are fewer.
    """
    away = messages * max(ranks - machine["near_ranks"], 0) / ranks
    wire = size / machine["network_gb_s"] / 1e3
    rest = max(machine[f"{which}_ns"] / 1e3 - wire, 0.0)
    if machine.kind == "gpu":  # low-latency kernels leave the cores alone: the network is all there is
        wire, rest = machine[f"{which}_ns"] / 1e3, 0.0
    latency = machine["node_us"] if ranks <= machine.ranks_per_node else machine["network_us"]
    start = machine["exchange_launch_us"] + machine["flights"] * latency
    moved = PASSES * messages * size / (machine["hbm_gb_s"] * machine["vector_memory"] * 1e3)
    return Exchanged(start, away * wire, away * rest / cores, moved)


def exchange_by_node(
    machine: Machine, which: Literal["dispatch", "combine"], tokens: float, size: float, reached: float
) -> Exchanged:
    """GPUs' kernels for many tokens: a token crosses to each node that it needs once (`reached` of them), and
    spreads there by NVLink."""
    wire = tokens * reached * size / (machine[f"normal_{which}_gb_s"] * 1e3)
    return Exchanged(
        machine["exchange_launch_us"] + machine["flights"] * machine["network_us"], wire, 0.0, 0.0
    )
