"""Allocation rate of supernodes by size, and switches of each size (section 6: figure 24, table 11).

A job's NPUs come in tightly coupled blocks, and a block lies in one supernode. The paper's trace is not
public, so sizes are assumed: powers of two up to `LARGEST`, where a size `s` is as likely as `s^-a` and `a`
gives the mean. Blocks wait in one queue, first come first served, that is never empty, and stay for
exponential times. So larger supernodes are fuller, as the figure shows. What the figure shows for larger
blocks does not follow: their mean matters less than how many of them are large.
"""

import heapq
import math
from dataclasses import asdict, dataclass

import numpy as np

from cmx_jax.errors import CmxError

LARGEST = 128  # NPUs of a block; every supernode compared holds at least one such block
TOTAL = 5376  # NPUs, or as many as make whole supernodes
PLANES, LINKS, PORTS, PER_NODE = 7, 16, 96, 8
"""UB switches: number of sub-planes; a node's links to each sub-plane; ports of a logical switch, which is
two chips; NPUs per node."""
PUBLISHED_RATES = {
    (384, 10.08): ("above", 0.94),
    (224, 10.08): ("below", 0.91),
    (224, 11.28): ("below", 0.85),
}
PUBLISHED_SWITCHES = {384: (56, 1.0), 352: (56, 0.92), 288: (42, 1.0), 256: (42, 0.89), 192: (28, 1.0)}


def block_sizes(mean: float, largest: int = LARGEST) -> tuple[np.ndarray, np.ndarray]:
    """Sizes of blocks in NPUs, and the probability of each.

    Raises:
      CmxError: The mean lies outside the sizes, or the largest size is not a power of two.
    """
    if largest < 1 or largest & (largest - 1):
        raise CmxError(f"the largest block is {largest} NPUs, expected a power of two")
    if not 1 <= mean <= largest:
        raise CmxError(f"the mean block is {mean:g} NPUs, expected 1 to the largest, {largest}")
    sizes = 2 ** np.arange(largest.bit_length())

    def likely(power: float) -> np.ndarray:
        weights = np.exp2(-power * np.arange(len(sizes)) - max(-power * (len(sizes) - 1), 0.0))
        probabilities: np.ndarray = weights / weights.sum()
        return probabilities

    low, high = -64.0, 64.0
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if likely(middle) @ sizes > mean else (low, middle)
    return sizes, likely(low)


def allocation_rate(
    supernode: int,
    mean: float,
    *,
    largest: int = LARGEST,
    supernodes: int | None = None,
    fit: str = "best",
    blocks: int = 40000,
    seed: int = 0,
) -> float:
    """Share of NPUs that are allocated to blocks, averaged over time, by simulation.

    Args:
      supernode: NPUs per supernode.
      mean: Mean size of a block, in NPUs.
      largest: Largest size of a block, in NPUs.
      supernodes: Number of supernodes; None means as many as `TOTAL` NPUs make.
      fit: `best` places a block where it leaves the least space; `first` in the first supernode with space.
      blocks: Number of blocks placed, of which the first third is not measured.
      seed: Seed of sizes and durations.

    Raises:
      CmxError: A size, a count or `fit` is impossible.
    """
    count = TOTAL // max(supernode, 1) if supernodes is None else supernodes
    if supernode < largest or count < 1:
        raise CmxError(
            f"{count} supernodes of {supernode} NPUs, expected at least one that holds the largest block, "
            f"{largest}, and at most {TOTAL} NPUs"
        )
    if fit not in ("best", "first"):
        raise CmxError(f"fit is {fit!r}, expected best or first")
    if blocks < 1 or seed < 0:
        raise CmxError(f"blocks is {blocks} and seed {seed}, expected 1 or more and zero or more")
    rng = np.random.default_rng(seed)
    sizes, likely = block_sizes(mean, largest)
    stays = rng.exponential(size=blocks).tolist()
    free, ends = np.full(count, supernode), [(math.inf, 0, 0)]
    now, used, area, began = 0.0, 0, 0.0, 0.0
    for n, size in enumerate(rng.choice(sizes, size=blocks, p=likely).tolist()):
        while not (room := free >= size).any():
            time, index, size_freed = heapq.heappop(ends)
            area, now, used = area + used * (time - now), time, used - size_freed
            free[index] += size_freed
        if n == blocks // 3:
            area, began = 0.0, now
        index = int(room.argmax() if fit == "first" else np.where(room, free, supernode + 1).argmin())
        free[index] -= size
        used += size
        heapq.heappush(ends, (now + stays[n], index, size))
    if now == began:
        raise CmxError(f"{blocks} blocks do not fill {count} supernodes of {supernode} NPUs, expected more")
    return area / (now - began) / (count * supernode)


def switches(npus: int) -> tuple[int, float]:
    """Logical switches in a supernode's second tier, and the share of their ports in use (table 11).

    A node's `LINKS` links to a sub-plane spread over its switches, each of which has `PORTS` ports.

    Raises:
      CmxError: `npus` is not a number of whole nodes.
    """
    nodes, rest = divmod(npus, PER_NODE)
    if nodes < 1 or rest:
        raise CmxError(f"a supernode of {npus} NPUs, expected whole nodes of {PER_NODE}")
    per_plane = math.ceil(nodes * LINKS / PORTS)
    return PLANES * per_plane, nodes * LINKS / (per_plane * PORTS)


@dataclass(frozen=True)
class Assumptions:
    """Assumptions of the simulation; see `allocation_rate`."""

    largest: int = LARGEST
    fit: str = "best"
    blocks: int = 40000
    seed: int = 0


@dataclass(frozen=True)
class Rate:
    """Allocation rate of one size of supernode with one mean block.

    Attributes:
      supernode: NPUs per supernode.
      mean_block: Mean size of a block, in NPUs.
      rate: Share of NPUs that are allocated.
      published: Published bound, such as `above 94%`; None if there is none.
      met: True if the rate is within the bound; None without a bound.
    """

    supernode: int
    mean_block: float
    rate: float
    published: str | None
    met: bool | None


@dataclass(frozen=True)
class SwitchCount:
    """Switches of one size of supernode.

    Attributes:
      npus: NPUs per supernode.
      switches: Number of logical switches in the second tier.
      port_use: Share of the switches' ports in use.
      npus_per_switch: NPUs per logical switch.
      published: Table 11's number of switches and port use; None for sizes that are not listed there.
    """

    npus: int
    switches: int
    port_use: float
    npus_per_switch: float
    published: tuple[int, float] | None


@dataclass(frozen=True)
class Allocation:
    """Allocation rates and switches of several sizes of supernode."""

    assumed: Assumptions
    rates: list[Rate]
    switches: list[SwitchCount]


def allocation(supernodes: list[int], means: list[float], assumed: Assumptions = Assumptions()) -> Allocation:
    """Simulates every size of supernode with every mean block, and counts the switches of each size.

    Args:
      supernodes: Sizes of supernodes, in NPUs.
      means: Mean sizes of a block, in NPUs.
      assumed: Assumptions of the simulation.

    Raises:
      CmxError: A size, a count or `fit` is impossible.
    """
    rates, counts = [], []
    for supernode in supernodes:
        count, use = switches(supernode)
        counts.append(
            SwitchCount(supernode, count, use, supernode / count, PUBLISHED_SWITCHES.get(supernode))
        )
        rates += [_rate(supernode, mean, assumed) for mean in means]
    return Allocation(assumed, rates, counts)


def _rate(supernode: int, mean: float, assumed: Assumptions) -> Rate:
    rate = allocation_rate(supernode, mean, **asdict(assumed))
    if (supernode, mean) not in PUBLISHED_RATES:
        return Rate(supernode, mean, rate, None, None)
    side, bound = PUBLISHED_RATES[supernode, mean]
    return Rate(supernode, mean, rate, f"{side} {bound:.0%}", (rate > bound) == (side == "above"))


def render(result: Allocation) -> str:
    """Formats both tables for a terminal."""
    lines = [f"{'supernode':>9}{'mean block':>12}{'allocated':>11}  published"]
    for r in result.rates:
        published = f"{r.published}{'' if r.met else ': not met'}" if r.published else ""
        lines.append(f"{r.supernode:>9}{r.mean_block:>12g}{r.rate:>11.1%}  {published}".rstrip())
    lines += ["", f"{'NPUs':>9}{'switches':>12}{'ports used':>12}{'NPUs each':>11}  published"]
    for row in result.switches:
        published = "{} switches, {:.0%}".format(*row.published) if row.published else ""
        numbers = f"{row.npus:>9}{row.switches:>12}{row.port_use:>12.1%}{row.npus_per_switch:>11.2f}"
        lines.append(f"{numbers}  {published}".rstrip())
    return "\n".join(lines)
