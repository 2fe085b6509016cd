"""INT8 rows of several parts, each with a scale of its own: none is rounded by the size of another."""

from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Array, Float

from cmx_jax.quant.int8 import dequantize, quantize_rows


@struct.dataclass
class Int8Rows:
    """Rows of which part `s` is `q * scale[s]`; the parts lie behind each other along `C`."""

    q: Any  # int8 [..., C]
    scale: Any  # float32 [..., S]


def quantize_parts(x: Float[Array, "*N C"], widths: tuple[int, ...]) -> Int8Rows:
    """Each part of each row as `quantize_rows` has it; `widths` of the `S` parts make up `C`."""
    parts = _parts(x, widths)
    q, scale = zip(*(quantize_rows(part, jnp.ones(part.shape[:-1], bool)) for part in parts), strict=True)
    return Int8Rows(jnp.concatenate(q, axis=-1), jnp.stack(scale, axis=-1))


def dequantize_parts(rows: Int8Rows, widths: tuple[int, ...], dtype: Any) -> Float[Array, "*N C"]:
    """The numbers that `quantize_parts` rounded to, in `dtype`."""
    parts = enumerate(_parts(rows.q, widths))
    return jnp.concatenate([dequantize(q, rows.scale[..., s], dtype) for s, q in parts], axis=-1)


def _parts(x: Array, widths: tuple[int, ...]) -> list[Array]:
    return jnp.split(x, np.cumsum(widths)[:-1].tolist(), axis=-1)
