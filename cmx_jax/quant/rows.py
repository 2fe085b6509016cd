"""INT8 rows of several parts, each with its own scale, so that no part is rounded by the size of another."""

from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Array, Float

from cmx_jax.quant.int8 import dequantize, quantize_rows


@struct.dataclass
class Int8Rows:
    """Rows in parts: part `p` of a row is the numbers of that part times `scale[p]`.

    Attributes:
      q: Quantised numbers, the parts one after another, int8 [..., width].
      scale: Scale of each part, float32 [..., parts].
    """

    q: Any
    scale: Any


def quantize_parts(x: Float[Array, "*B width"], widths: tuple[int, ...]) -> Int8Rows:
    """Quantises each part of each row by `quantize_rows`. `widths` are the widths of the parts."""
    parts = _parts(x, widths)
    q, scale = zip(*(quantize_rows(part, jnp.ones(part.shape[:-1], bool)) for part in parts), strict=True)
    return Int8Rows(jnp.concatenate(q, axis=-1), jnp.stack(scale, axis=-1))


def dequantize_parts(rows: Int8Rows, widths: tuple[int, ...], dtype: Any) -> Float[Array, "*B width"]:
    """Dequantises the result of `quantize_parts` to `dtype`."""
    parts = enumerate(_parts(rows.q, widths))
    return jnp.concatenate([dequantize(q, rows.scale[..., i], dtype) for i, q in parts], axis=-1)


def _parts(x: Array, widths: tuple[int, ...]) -> list[Array]:
    return jnp.split(x, np.cumsum(widths)[:-1].tolist(), axis=-1)
