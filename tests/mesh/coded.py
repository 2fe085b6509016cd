"""Tokens that carry their rank and index, and experts that stamp their slot: misrouted tokens are visible.

Experts return NaN for every empty row and inactive tokens hold NaN; neither may reach a result.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P

from cmx_jax.mesh import make_runner
from cmx_jax.mesh.exchange import Axis, ExchangeArgs, Wire, exchange, worst_case_rows
from cmx_jax.testing import rank_coded

TOKENS, TOP_K = 3, 2  # tokens per rank, experts per token
WORST = 0  # rows: the worst case

Routing = Callable[[int, int, np.random.Generator], np.ndarray]


@functools.cache
def program(
    kind: str,
    axes: tuple[tuple[str, int], ...],
    axis: Axis,
    slots_per_rank: int,
    rows: int,
    method: str = "flat",
    wire: str = "float32",
) -> Callable[..., tuple[jax.Array, jax.Array, jax.Array]]:
    """Compiles an exchange of all ranks.

    The program maps tokens, slots and weights to results and each rank's number of rounds and sent messages.
    """
    names = (axis,) if isinstance(axis, str) else axis
    spec = P((*(name for name, _ in axes if name not in names), *names))

    def rank(x: jax.Array, slots: jax.Array, weights: jax.Array) -> tuple[jax.Array, ...]:
        first = jax.lax.axis_index(axis) * slots_per_rank
        worst = worst_case_rows(*slots.shape, slots_per_rank)

        def experts(received: jax.Array, local: jax.Array, read: Wire) -> jax.Array:
            tokens = read.tokens(received)
            stamped = tokens * (first + local + 1).astype(tokens.dtype)[:, None]
            return jnp.where(local[:, None] < 0, jnp.nan, stamped)

        args = ExchangeArgs(axis, slots_per_rank, worst if rows == WORST else rows, wire)
        y, stats = exchange(method)(x, slots, weights, experts, args)
        return y, stats.rounds[None], stats.sent[None]

    return make_runner(kind, axes).jit(rank, (spec,) * 3, (spec,) * 3)


def by_hand(x: np.ndarray, slots: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Computes the results of `program` in NumPy."""
    y = np.zeros_like(x)
    for t, k in np.argwhere(slots >= 0):
        y[t] += weights[t, k] * (x[t] * (slots[t, k] + 1))
    return y


def longest_queue(slots: np.ndarray, ranks: int, slots_per_rank: int) -> int:
    """Returns the largest number of messages from any rank to any rank."""
    counts = np.zeros((ranks, ranks), int)
    for t, k in np.argwhere(slots >= 0):
        counts[t // (len(slots) // ranks), slots[t, k] // slots_per_rank] += 1
    return counts.max()


def coded(slots: np.ndarray, ranks: int) -> tuple[np.ndarray, np.ndarray]:
    """Makes rank-coded tokens of width 3 (NaN where inactive) and small integer weights."""
    t = np.arange(len(slots))
    x = rank_coded(ranks, (len(slots) // ranks, 3))
    x[(slots < 0).all(1)] = np.nan
    return x, (1 + np.add.outer(t, 2 * np.arange(slots.shape[1])) % 3).astype(np.float32)


def likely(ranks: int, slots_per_rank: int, rng: np.random.Generator, skew: float) -> np.ndarray:
    """Draws distinct slots for each token, slot `s` with a probability that falls as `(s + 1) ** -skew`."""
    total = ranks * slots_per_rank
    chance = rng.gumbel(size=(ranks * TOKENS, total)) - skew * np.log(np.arange(total) + 1)
    return np.argsort(-chance, axis=1)[:, :TOP_K].astype(np.int32)


def uniform(ranks: int, slots_per_rank: int, rng: np.random.Generator) -> np.ndarray:
    return likely(ranks, slots_per_rank, rng, 0.0)


def zipf(ranks: int, slots_per_rank: int, rng: np.random.Generator) -> np.ndarray:
    return likely(ranks, slots_per_rank, rng, 1.5)


def holes(ranks: int, slots_per_rank: int, rng: np.random.Generator) -> np.ndarray:
    slots = zipf(ranks, slots_per_rank, rng)
    slots[::2] = -1  # inactive tokens
    slots[rng.random(slots.shape) < 0.3] = -1
    return slots


def one_expert(ranks: int, slots_per_rank: int, rng: np.random.Generator) -> np.ndarray:
    return np.tile(np.array([ranks * slots_per_rank - 1, -1], np.int32), (ranks * TOKENS, 1))


def one_rank(ranks: int, slots_per_rank: int, rng: np.random.Generator) -> np.ndarray:
    choices = [ranks // 2 * slots_per_rank + k if k < slots_per_rank else -1 for k in range(TOP_K)]
    return np.tile(np.array(choices, np.int32), (ranks * TOKENS, 1))


def no_messages(ranks: int, slots_per_rank: int, rng: np.random.Generator) -> np.ndarray:
    return np.full((ranks * TOKENS, TOP_K), -1, np.int32)
