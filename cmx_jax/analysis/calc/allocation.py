"""How much of many supernodes can be given away, and their switches (section 6: figure 24, table 11).

A job's NPUs come in tightly coupled blocks, and a block lies in one supernode. The paper's trace is not
public, so sizes are assumed: powers of two up to `LARGEST`, those of size `s` as often as `s^-a`, where `a`
gives the mean. Blocks wait in one queue, first come first served, that is never empty, and stay for
exponential times. So larger supernodes are fuller, as the figure has it. What it has of larger blocks does
not follow: their mean says less than how many of them are large.
"""

import heapq
import math
from typing import Any

import numpy as np

from cmx_jax.errors import CmxError

LARGEST = 128  # NPUs of a block: below that the supernodes compared all hold one
TOTAL = 5376  # NPUs, or as many as make whole supernodes
PLANES, LINKS, PORTS, PER_NODE = 7, 16, 96, 8
"""Of the UB switches: sub-planes; a node's links to each; ports of a logical switch, which is two chips; NPUs
of a node."""
PUBLISHED_RATES = {
    (384, 10.08): ("above", 0.94),
    (224, 10.08): ("below", 0.91),
    (224, 11.28): ("below", 0.85),
}
PUBLISHED_SWITCHES = {384: (56, 1.0), 352: (56, 0.92), 288: (42, 1.0), 256: (42, 0.89), 192: (28, 1.0)}


def block_sizes(mean: float, largest: int = LARGEST) -> tuple[np.ndarray, np.ndarray]:
    """Sizes of blocks and how likely each is.

    Raises:
      CmxError: the mean is not among the sizes, or the largest is no power of two.
    """
    if largest < 1 or largest & (largest - 1):
        raise CmxError(f"the largest block is {largest} NPUs, expected a power of two")
    if not 1 <= mean <= largest:
        raise CmxError(f"the mean block is {mean:g} NPUs, expected 1 to the largest, {largest}")
    sizes = 2 ** np.arange(largest.bit_length())

    def likely(power: float) -> np.ndarray:
        weights = np.exp2(-power * np.arange(len(sizes)) - max(-power * (len(sizes) - 1), 0.0))
        found: np.ndarray = weights / weights.sum()
        return found

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
    """The share of NPUs that are given to blocks, over time, by simulation.

    Args:
      supernode: NPUs of each.
      mean: NPUs of a block.
      largest: the most of one.
      supernodes: how many; None: `TOTAL` NPUs.
      fit: `best`: where least is left; `first`: the first that has room.
      blocks: that are placed, of which the first third is not looked at.
      seed: of sizes and times.

    Raises:
      CmxError: a size, a count or `fit` that cannot be.
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
            time, at, gone = heapq.heappop(ends)
            area, now, used = area + used * (time - now), time, used - gone
            free[at] += gone
        if n == blocks // 3:
            area, began = 0.0, now
        at = int(room.argmax() if fit == "first" else np.where(room, free, supernode + 1).argmin())
        free[at] -= size
        used += size
        heapq.heappush(ends, (now + stays[n], at, size))
    if now == began:
        raise CmxError(f"{blocks} blocks do not fill {count} supernodes of {supernode} NPUs, expected more")
    return area / (now - began) / (count * supernode)


def switches(npus: int) -> tuple[int, float]:
    """Logical switches of a supernode's second tier, and the share of their ports that is used (table 11).

    A node's `LINKS` links to a sub-plane spread over its switches, of `PORTS` ports each.

    Raises:
      CmxError: no whole nodes.
    """
    nodes, rest = divmod(npus, PER_NODE)
    if nodes < 1 or rest:
        raise CmxError(f"a supernode of {npus} NPUs, expected whole nodes of {PER_NODE}")
    each = math.ceil(nodes * LINKS / PORTS)
    return PLANES * each, nodes * LINKS / (each * PORTS)


def allocation(supernodes: list[int], means: list[float], **given: Any) -> dict[str, Any]:
    """Every size of supernode with every mean block; then its switches.

    Args:
      supernodes: NPUs of each.
      means: NPUs of a block.
      given: others of `allocation_rate`.

    Returns:
      `rates`: rows of `supernode`, `mean_block`, `rate`, and where there is one the `published` bound and
      whether it is `met`; `switches`: rows of `npus`, `switches`, `port_use`, `npus_per_switch` and, where
      table 11 has them, switches and port use as `published`.

    Raises:
      CmxError: nonsense.
    """
    rates, tier = [], []
    for supernode in supernodes:
        count, use = switches(supernode)
        row = {"npus": supernode, "switches": count, "port_use": use, "npus_per_switch": supernode / count}
        tier.append(row | {"published": PUBLISHED_SWITCHES.get(supernode)})
        for mean in means:
            rate = allocation_rate(supernode, mean, **given)
            side, bound = PUBLISHED_RATES.get((supernode, mean), (None, 0.0))
            published = f"{side} {bound:.0%}" if side else None
            met = (rate > bound) == (side == "above") if side else None
            one = {"supernode": supernode, "mean_block": mean, "rate": rate}
            rates.append(one | {"published": published, "met": met})
    return {"assumed": given, "rates": rates, "switches": tier}


def render(found: dict[str, Any]) -> str:
    """Both tables."""
    lines = [f"{'supernode':>9}{'mean block':>12}{'allocated':>11}  published"]
    for r in found["rates"]:
        said = f"{r['published']}{'' if r['met'] else ': not met'}" if r["published"] else ""
        lines.append(f"{r['supernode']:>9}{r['mean_block']:>12g}{r['rate']:>11.1%}  {said}".rstrip())
    lines += ["", f"{'NPUs':>9}{'switches':>12}{'ports used':>12}{'NPUs each':>11}  published"]
    for r in found["switches"]:
        said = "{} switches, {:.0%}".format(*r["published"]) if r["published"] else ""
        numbers = f"{r['npus']:>9}{r['switches']:>12}{r['port_use']:>12.1%}{r['npus_per_switch']:>11.2f}"
        lines.append(f"{numbers}  {said}".rstrip())
    return "\n".join(lines)
