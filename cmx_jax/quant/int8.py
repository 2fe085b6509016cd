"""Symmetric INT8 arrays: weights with a static scale for each output channel, activations with a dynamic
one for each token (section 4.5)."""

from typing import Any

import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Bool, Float, Int8


@struct.dataclass
class QTensor:
    """A tensor as `q * scale`.

    * `|q| <= 127`: -128 is never used, so that negation is exact.
    * `scale` has as many axes as `q`, of length 1 where one scale holds for all: along a matrix's inputs.
    * A channel of zeros has scale 1.
    """

    q: Any  # int8
    scale: Any  # bfloat16 or float32

    @property
    def shape(self) -> tuple[int, ...]:
        return self.q.shape


def quantize_rows(
    x: Float[Array, "*N D"], valid: Bool[Array, " *N"]
) -> tuple[Int8[Array, "*N D"], Float[Array, " *N"]]:
    """Rounds each row to `round(x / scale)` with `scale = max|row| / 127`, in float32.

    * `|q| <= 127`: -128 is never used, so that negation is exact.
    * `|x - q * scale| <= scale / 2` for every valid row, up to float32 rounding. Rows whose largest number is
      below about 1e-36 become zeros (their scale is no normal number).
    * Invalid rows give zeros and scale 0 whatever they hold, NaN included: a stale row must not
      reach a scale.
    """
    rows = jnp.where(valid[..., None], x.astype(jnp.float32), 0.0)
    scale = jnp.max(jnp.abs(rows), axis=-1) / 127.0
    inverse = jnp.where(scale > 0, 1.0 / jnp.where(scale > 0, scale, 1.0), 0.0)
    q = jnp.clip(jnp.round(rows * inverse[..., None]), -127, 127)
    return q.astype(jnp.int8), scale


def dequantize(q: Int8[Array, "*N D"], scale: Float[Array, " *N"], dtype: jnp.dtype) -> Float[Array, "*N D"]:
    """`q * scale` in `dtype`, multiplied in float32."""
    return (q.astype(jnp.float32) * scale[..., None]).astype(dtype)
