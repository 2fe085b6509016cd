"""Symmetric INT8 arrays (section 4.5).

Weights have a static scale for each output channel, activations a dynamic scale for each token.
"""

from typing import Any

import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Bool, Float, Int8


@struct.dataclass
class QTensor:
    """A tensor as `q * scale`.

    Attributes:
      q: Quantised numbers, int8. `|q| <= 127`: -128 is never used, so that negation is exact.
      scale: Scales, bfloat16 or float32, with as many axes as `q`. An axis has length 1 where one scale holds
        for all, as along a matrix's inputs. A channel of zeros has scale 1.
    """

    q: Any
    scale: Any

    @property
    def shape(self) -> tuple[int, ...]:
        return self.q.shape


def quantize_rows(
    x: Float[Array, "*B D"], valid: Bool[Array, " *B"]
) -> tuple[Int8[Array, "*B D"], Float[Array, " *B"]]:
    """Rounds each row to `round(x / scale)` with `scale = max|row| / 127`, in float32.

    * `|q| <= 127`: -128 is never used, so that negation is exact.
    * `|x - q * scale| <= scale / 2` for every valid row, up to float32 rounding. Rows whose largest number is
      below about 1e-36 become zeros (their scale is not a normal number).
    * Invalid rows give zeros and scale 0 whatever they hold, NaN included: a stale row must not reach a
      scale.

    Args:
      x: Rows.
      valid: True for rows that are valid.

    Returns:
      Quantised rows and the scale of each row.
    """
    rows = jnp.where(valid[..., None], x.astype(jnp.float32), 0.0)
    scale = jnp.max(jnp.abs(rows), axis=-1) / 127.0
    inverse = jnp.where(scale > 0, 1.0 / jnp.where(scale > 0, scale, 1.0), 0.0)
    q = jnp.clip(jnp.round(rows * inverse[..., None]), -127, 127)
    return q.astype(jnp.int8), scale


def dequantize(q: Int8[Array, "*B D"], scale: Float[Array, " *B"], dtype: jnp.dtype) -> Float[Array, "*B D"]:
    """Computes `q * scale` in `dtype`, multiplied in float32."""
    return (q.astype(jnp.float32) * scale[..., None]).astype(dtype)
