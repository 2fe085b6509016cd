"""How much more than the mean the busiest rank gets to do, as all others wait for it.

Even a router that chooses all experts alike leaves some: an expert in one slot weighs more than one in two,
and of tokens that choose at random some rank gets more by chance.
"""

import math
from functools import lru_cache

import numpy as np

from cmx_jax.errors import CmxError
from cmx_jax.mesh.layout import Layout
from cmx_jax.mesh.placement import place, spread_evenly

MAX_EXPONENT = 10.0


def power_law(experts: int, exponent: float) -> np.ndarray:
    """Shares of the load, float64 [E]: of the `r`-th busiest expert in proportion to `r ** -exponent`.

    0 is even. Loads of DeepSeek-R1 that were published with SGLang's large-scale benchmarks have 0.55 to 0.8.
    The order is shuffled, always alike: popularity knows nothing of an expert's number.

    Raises:
      CmxError: the exponent is no such number.
    """
    if not 0 <= exponent <= MAX_EXPONENT:
        raise CmxError(f"exponent {exponent} of the experts' load, expected 0 (even) to {MAX_EXPONENT:g}")
    share: np.ndarray = np.arange(1, experts + 1, dtype=np.float64) ** -exponent
    return np.random.default_rng(0).permutation(share / share.sum())


@lru_cache(maxsize=1024)
def busiest(
    layout: Layout,
    popular: tuple[float, ...],
    top_k: int,
    shared_experts: int,
    tokens: int,
    eplb: bool = True,
) -> float:
    """Load of the busiest rank over the mean of all, in one MoE layer; the median over such layers.

    Args:
      layout: slots and ranks.
      popular: of all choices, those for each routed expert, `E` numbers that add up to 1.
      top_k: experts that a token chooses.
      shared_experts: that lie in the layout's shared slots.
      tokens: of a rank, that go through the layer together.
      eplb: whether the placement knows what is popular; if not, it takes all for equal.
    """
    experts, choices = len(popular), tokens * layout.expert_ranks * top_k
    known = np.asarray(popular) if eplb else np.full(experts, 1 / experts)
    if layout.replicated:
        table = place(known[None], layout, top_k=top_k, shared_experts=shared_experts)[0]
    else:
        table = spread_evenly(1, experts, layout)[0]
    each = np.append(popular, np.full(shared_experts, 1 / top_k))  # every token goes to each shared expert
    each /= np.maximum(np.bincount(table[table >= 0], minlength=len(each)), 1)
    share = np.where(table < 0, 0.0, each[np.maximum(table, 0)]) * choices
    by_chance = np.where(table < experts, share, 0.0)  # copies of a shared expert are dealt in turn
    mean, variance = (a.reshape(layout.expert_ranks, -1).sum(axis=1) for a in (share, by_chance))
    return _median_of_largest(mean, np.sqrt(variance)) / float(mean.mean())


def _median_of_largest(mean: np.ndarray, spread: np.ndarray) -> float:
    """Of independent normal numbers: what a rank's messages are, nearly, when tokens choose by themselves."""
    pairs, times = np.unique(np.stack([mean, spread], axis=1).round(6), axis=0, return_counts=True)
    low, high = float(mean.max()), float((mean + 10 * spread).max())

    def likely(x: float) -> float:
        """That all are below."""
        product = 1.0
        for (m, s), n in zip(pairs.tolist(), times.tolist(), strict=True):
            product *= (0.5 * (1 + math.erf((x - m) / s / math.sqrt(2))) if s else float(x >= m)) ** n
        return product

    while high - low > 1e-6 * high:
        middle = (low + high) / 2
        low, high = (middle, high) if likely(middle) < 0.5 else (low, middle)
    return (low + high) / 2
