"""Sampling inside the step's graph: greedy, temperature, top-k, top-p, one seed a request."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Float, Int


@struct.dataclass
class Sampling:
    """One row a sequence."""

    temperature: Any  # [B] float32; 0 is greedy
    top_k: Any  # [B] int32; 0 keeps all
    top_p: Any  # [B] float32 in (0, 1]
    seed: Any  # [B] uint32


@struct.dataclass
class Logprobs:
    """Logarithms of probabilities, before temperature, top-k and top-p."""

    chosen: Any  # [B, T] float32: of the tokens taken
    top: Any  # [B, T, MAX_LOGPROBS] float32: the largest, in order
    tokens: Any  # [B, T, MAX_LOGPROBS] int32: whose those are


MAX_LOGPROBS = 20  # OpenAI's limit


def logprobs_of(logits: Float[Array, "B T O"], tokens: Int[Array, "B T"]) -> Logprobs:
    """What a model said of the tokens taken, and of those that it found likeliest."""
    with jax.named_scope("Logprobs"):
        every = jax.nn.log_softmax(logits.astype(jnp.float32), axis=-1)
        chosen = jnp.take_along_axis(every, tokens[..., None], axis=-1)[..., 0]
        top, which = jax.lax.top_k(every, min(MAX_LOGPROBS, logits.shape[-1]))
        return Logprobs(chosen, top, which.astype(jnp.int32))


def next_tokens(
    logits: Float[Array, "B T O"], s: Sampling, positions: Int[Array, "B T"], sampled: bool
) -> Int[Array, "B T"]:
    """Greedy, or drawn as `sample` does.

    Args:
      logits: of tokens that stand at `positions`.
      s: of each sequence `[B]`, or of each token `[B, T]`.
      sampled: whether any is not greedy.
    """
    with jax.named_scope("Sampling"):
        if not sampled:
            return greedy(logits)
        rows = jax.tree.map(lambda a: jnp.broadcast_to(a.reshape(len(a), -1), positions.shape).reshape(-1), s)
        drawn = sample(logits.reshape(-1, logits.shape[-1]), rows, positions.reshape(-1))
        return drawn.reshape(positions.shape)


def greedy(logits: Float[Array, "*B O"]) -> Int[Array, " *B"]:
    """The likeliest token, the first of equals."""
    return jnp.argmax(logits, axis=-1).astype(jnp.int32)


def sample(logits: Float[Array, "B O"], s: Sampling, positions: Int[Array, " B"]) -> Int[Array, " B"]:
    """One token a row.

    The draw depends on the request's seed and the token's position alone, so that a request gives the same
    text in any batch, on any rank. Top-k is applied first; of what it keeps, top-p keeps the fewest
    likeliest tokens that reach `top_p`, at least one (vLLM's order).
    """
    vocab = logits.shape[-1]
    ordered, order = jax.lax.top_k(logits, vocab)
    # from the best one on: a tiny temperature then gives -inf and 0, never inf
    ordered = (ordered - ordered[:, :1]) / jnp.where(s.temperature > 0, s.temperature, 1.0)[:, None]
    rank = jnp.arange(vocab, dtype=jnp.int32)[None]
    top_k = jnp.where(s.top_k > 0, s.top_k, vocab)[:, None]
    ordered = jnp.where(rank < top_k, ordered, -jnp.inf)
    p = jax.nn.softmax(ordered, axis=-1)
    kept = jnp.cumsum(p, axis=-1) - p < s.top_p[:, None]

    def draw(seed: Array, position: Array, row: Array) -> Array:
        key = jax.random.fold_in(jax.random.key(seed), position)
        return jax.random.categorical(key, row)

    choice = jax.vmap(draw)(s.seed, positions, jnp.where(kept, ordered, -jnp.inf))
    drawn = jnp.take_along_axis(order, choice[:, None], axis=-1)[:, 0].astype(jnp.int32)
    return jnp.where(s.temperature > 0, drawn, greedy(logits))
