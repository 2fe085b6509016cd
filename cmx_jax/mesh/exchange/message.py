"""One message on the wire: a copy of a token for one expert.

The token's `D` numbers on the wire type, and behind them where it goes (and its scale, for INT8), so that one
collective carries everything.
"""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Shaped

from cmx_jax.quant import dequantize, quantize_rows

WIRES = ("float32", "bfloat16", "int8")
MAX_SLOTS_PER_RANK = 127 * 128 + 126  # what two INT8 digits tell apart, see pack
_META = {"float32": 2, "bfloat16": 2, "int8": 6}  # elements behind the token, see pack


def message_bytes(width: int, wire: str) -> int:
    """Bytes of one dispatched message on the wire: the token and what is packed behind it."""
    return (width + _META[wire]) * jnp.dtype(wire).itemsize


def pack(
    x: Shaped[Array, "N D"], slot: Int[Array, " N"], valid: Bool[Array, " N"], wire: str
) -> Shaped[Array, "N M"]:
    """Token and metadata as one row. The slot travels as two digits that every wire type holds exactly."""
    stamp = jnp.where(valid, slot + 1, 0)  # 0 marks an empty row
    digits = jnp.stack([stamp // 128, stamp % 128], axis=-1)
    if wire == "int8":
        q, scale = quantize_rows(x, valid)
        return jnp.concatenate(
            [q, jax.lax.bitcast_convert_type(scale, jnp.int8), digits.astype(jnp.int8)], axis=-1
        )
    token = jnp.where(valid[:, None], x, jnp.zeros((), x.dtype)).astype(wire)
    return jnp.concatenate([token, digits.astype(wire)], axis=-1)


@dataclass(frozen=True)
class Wire:
    """How received rows are read: of tokens `width` wide, on a wire type, to be had as `dtype`.

    Reading is left to whoever needs a row: most rows of a mailbox are empty.
    """

    width: int
    kind: str
    dtype: Any

    def slots(self, rows: Shaped[Array, "N M"]) -> Int[Array, " N"]:
        """The local slot of each row; -1: an empty one."""
        digits = rows[:, -2:].astype(jnp.int32)
        return digits[:, 0] * 128 + digits[:, 1] - 1

    def tokens(self, rows: Shaped[Array, "*N M"]) -> Float[Array, "*N D"]:
        """The token of each row."""
        if self.kind != "int8":
            return rows[..., : self.width].astype(self.dtype)
        scale = jax.lax.bitcast_convert_type(rows[..., self.width : self.width + 4], jnp.float32)
        return dequantize(rows[..., : self.width], scale, self.dtype)
