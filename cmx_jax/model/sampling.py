"""Sampling inside the program of a step: greedy, temperature, top-k, top-p, one seed per request."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Float, Int


@struct.dataclass
class Sampling:
    """Sampling parameters, one entry per sequence."""

    temperature: Any  # [B] float32; 0 is greedy
    top_k: Any  # [B] int32; 0 keeps all
    top_p: Any  # [B] float32 in (0, 1]
    seed: Any  # [B] uint32


@struct.dataclass
class Logprobs:
    """Logarithms of probabilities, before temperature, top-k and top-p."""

    chosen: Any  # [B, T] float32: logprobs of the chosen tokens
    top: Any  # [B, T, MAX_LOGPROBS] float32: the largest logprobs, in descending order
    tokens: Any  # [B, T, MAX_LOGPROBS] int32: the tokens of these


MAX_LOGPROBS = 20  # OpenAI's limit


def logprobs_of(logits: Float[Array, "B T O"], tokens: Int[Array, "B T"]) -> Logprobs:
    """Logprobs of the chosen tokens, and of the likeliest ones."""
    with jax.named_scope("Logprobs"):
        logprobs = jax.nn.log_softmax(logits.astype(jnp.float32), axis=-1)
        chosen = jnp.take_along_axis(logprobs, tokens[..., None], axis=-1)[..., 0]
        top, top_tokens = jax.lax.top_k(logprobs, min(MAX_LOGPROBS, logits.shape[-1]))
        return Logprobs(chosen, top, top_tokens.astype(jnp.int32))


def next_tokens(
    logits: Float[Array, "B T O"], s: Sampling, positions: Int[Array, "B T"], sampled: bool
) -> Int[Array, "B T"]:
    """Chooses the token at each position: the likeliest, or one drawn by `sample`.

    Args:
      logits: Logits of the tokens at `positions`.
      s: Parameters of each sequence `[B]`, or of each token `[B, T]`.
      positions: Positions of the chosen tokens in their sequences.
      sampled: True if any sequence is not greedy.
    """
    with jax.named_scope("Sampling"):
        if not sampled:
            return greedy(logits)
        rows = jax.tree.map(lambda a: jnp.broadcast_to(a.reshape(len(a), -1), positions.shape).reshape(-1), s)
        drawn = sample(logits.reshape(-1, logits.shape[-1]), rows, positions.reshape(-1))
        return drawn.reshape(positions.shape)


def greedy(logits: Float[Array, "*B O"]) -> Int[Array, " *B"]:
    """The likeliest token; the first one of several equally likely."""
    return jnp.argmax(logits, axis=-1).astype(jnp.int32)


def sample(logits: Float[Array, "B O"], s: Sampling, positions: Int[Array, " B"]) -> Int[Array, " B"]:
    """Draws one token per row.

    The draw depends only on the request's seed and the token's position, so that a request gives the same
    text in any batch, on any rank. Top-k is applied first. Of the tokens it keeps, top-p keeps the smallest
    number of likeliest ones that reach `top_p`, at least one (vLLM's order).
    """
    vocab = logits.shape[-1]
    ordered, order = jax.lax.top_k(logits, vocab)
    # relative to the best one: a tiny temperature then gives -inf and 0, never inf
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
