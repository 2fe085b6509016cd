"""Rotary position embedding: plain, linearly scaled, YaRN (arXiv 2309.00071), Llama 3.1's scaling."""

import math

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from cmx_jax.model.config import RopeConfig


def _yarn_range(rope: RopeConfig, dim: int) -> tuple[float, float]:
    """First and last rotary pair of the ramp from extrapolated to interpolated frequencies."""

    def pair_of(rotations: float) -> float:
        span = rope.original_max_position_embeddings / (rotations * 2 * math.pi)
        return dim * math.log(span) / (2 * math.log(rope.theta))

    low, high = pair_of(rope.beta_fast), pair_of(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    return low, high + 0.001 if low == high else high


def _llama3(rope: RopeConfig, plain: np.ndarray) -> np.ndarray:
    """Llama 3.1's scaling: slow pairs are stretched, fast ones kept, pairs in between blended."""
    turns = rope.original_max_position_embeddings * plain / (2 * math.pi)  # over the original context
    low, high = rope.low_freq_factor, rope.high_freq_factor
    blend = np.clip((turns - low) / max(high - low, 1e-30), 0, 1)
    return (1 - blend) * plain / rope.factor + blend * plain


def frequencies(rope: RopeConfig, dim: int) -> tuple[np.ndarray, float]:
    """Angular frequency of each of the `dim // 2` pairs (radians per position), and the cos/sin factor."""
    plain = 1.0 / rope.theta ** (np.arange(0, dim, 2, dtype=np.float64) / dim)
    if rope.kind == "default":
        return plain.astype(np.float32), 1.0
    if rope.kind == "linear":
        return (plain / rope.factor).astype(np.float32), 1.0
    if rope.kind == "llama3":
        return _llama3(rope, plain).astype(np.float32), 1.0
    low, high = _yarn_range(rope, dim)
    interpolated = np.clip((np.arange(dim // 2) - low) / (high - low), 0, 1)
    inverse = plain / rope.factor * interpolated + plain * (1 - interpolated)
    factor = rope.attention_factor
    if factor is None and rope.mscale and rope.mscale_all_dim:
        factor = rope.temperature(rope.mscale) / rope.temperature(rope.mscale_all_dim)
    if factor is None:
        factor = rope.temperature(1.0)
    return inverse.astype(np.float32), factor


def rotate(
    x: Float[Array, "B T H R"], positions: Int[Array, "B T"], rope: RopeConfig
) -> Float[Array, "B T H R"]:
    """Rotates each pair of `x` by its position.

    Pairs are `(0, 1), (2, 3), ...` if the config is `interleaved` (DeepSeek, Llama 4), else `(i, i + R/2)`;
    the result always has the first members of all pairs, then the second members.
    """
    dim = x.shape[-1]
    inverse, factor = frequencies(rope, dim)
    angles = positions.astype(jnp.float32)[:, :, None, None] * jnp.asarray(inverse)[None, None, None]
    cos = (jnp.cos(angles) * factor).astype(x.dtype)
    sin = (jnp.sin(angles) * factor).astype(x.dtype)
    first, second = (x[..., 0::2], x[..., 1::2]) if rope.interleaved else jnp.split(x, 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
