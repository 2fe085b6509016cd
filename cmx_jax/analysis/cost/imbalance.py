"""Load of the busiest rank relative to the mean: all other ranks wait for it.

Even a router that chooses all experts equally often leaves an imbalance: an expert in one slot loads its rank
more than an expert in two slots, and when tokens choose at random, some rank gets more of them by chance.
"""

import math
from functools import lru_cache

import numpy as np

from cmx_jax.errors import CmxError
from cmx_jax.mesh.layout import Layout
from cmx_jax.mesh.placement import place, spread_evenly

MAX_EXPONENT = 10.0


def power_law(experts: int, exponent: float) -> np.ndarray:
    """Returns each expert's share of the load, float64 [E]; the `r`-th busiest gets `r ** -exponent`, scaled.

    Exponent 0 means even load. Loads of DeepSeek-R1 that were published with SGLang's large-scale benchmarks
    have 0.55 to 0.8. The order is shuffled, always in the same way, as popularity does not depend on an
    expert's number.

    Raises:
      CmxError: The exponent is not a number between 0 and `MAX_EXPONENT`.
    """
    if not 0 <= exponent <= MAX_EXPONENT:
        raise CmxError(f"exponent {exponent} of the experts' load, expected 0 (even) to {MAX_EXPONENT:g}")
    share: np.ndarray = np.arange(1, experts + 1, dtype=np.float64) ** -exponent
    return np.random.default_rng(0).permutation(share / share.sum())


@lru_cache(maxsize=1024)
def busiest(
    layout: Layout,
    popularity: tuple[float, ...],
    top_k: int,
    shared_experts: int,
    tokens: int,
    eplb: bool = True,
) -> float:
    """Returns the load of the busiest rank in one MoE layer, relative to the mean.

    It is the median over such layers, as the tokens' choices are random.

    Args:
      layout: Layout with the experts' slots and ranks.
      popularity: Share of all choices that each routed expert gets: `E` numbers that add up to 1.
      top_k: Number of experts that a token chooses.
      shared_experts: Number of shared experts in the layout's shared slots.
      tokens: Number of tokens per rank that go through the layer together.
      eplb: Place experts by `popularity`; otherwise the placement takes all experts to be equally popular.
    """
    experts, choices = len(popularity), tokens * layout.expert_ranks * top_k
    known = np.asarray(popularity) if eplb else np.full(experts, 1 / experts)
    if layout.replicated:
        table = place(known[None], layout, top_k=top_k, shared_experts=shared_experts)[0]
    else:
        table = spread_evenly(1, experts, layout)[0]
    # every token goes to each shared expert
    per_copy = np.append(popularity, np.full(shared_experts, 1 / top_k))
    per_copy /= np.maximum(np.bincount(table[table >= 0], minlength=len(per_copy)), 1)
    share = np.where(table < 0, 0.0, per_copy[np.maximum(table, 0)]) * choices
    random_share = np.where(table < experts, share, 0.0)  # copies of a shared expert are dealt in turn
    mean, variance = (a.reshape(layout.expert_ranks, -1).sum(axis=1) for a in (share, random_share))
    return _median_of_largest(mean, np.sqrt(variance)) / float(mean.mean())


def _median_of_largest(mean: np.ndarray, spread: np.ndarray) -> float:
    """Returns the median of the largest of independent normal numbers.

    The number of messages of a rank is nearly normal, since tokens choose their experts independently.

    Args:
      mean: Mean of each number.
      spread: Standard deviation of each number.
    """
    pairs, counts = np.unique(np.stack([mean, spread], axis=1).round(6), axis=0, return_counts=True)
    low, high = float(mean.max()), float((mean + 10 * spread).max())

    def chance_below(x: float) -> float:
        """Returns the probability that every number is at most `x`."""
        product = 1.0
        for (m, s), n in zip(pairs.tolist(), counts.tolist(), strict=True):
            product *= (0.5 * (1 + math.erf((x - m) / s / math.sqrt(2))) if s else float(x >= m)) ** n
        return product

    while high - low > 1e-6 * high:
        middle = (low + high) / 2
        low, high = (middle, high) if chance_below(middle) < 0.5 else (low, middle)
    return (low + high) / 2
