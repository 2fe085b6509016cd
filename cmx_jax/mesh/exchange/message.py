"""One message on the wire: a copy of a token for one expert.

A message is the token's `D` numbers in the wire type, followed by the scale (INT8 only) and the expert slot,
so that one collective carries everything.

Letters in shapes: `Z` rows of a message buffer, `M` elements of a message.
"""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Shaped

from cmx_jax.quant import dequantize, quantize_rows

WIRES = ("float32", "bfloat16", "int8")
MAX_SLOTS_PER_RANK = 127 * 128 + 126  # slots that two INT8 digits can tell apart, see pack_messages
_META = {"float32": 2, "bfloat16": 2, "int8": 6}  # elements after the token, see pack_messages


def message_bytes(width: int, wire: str) -> int:
    """Bytes of one dispatched message on the wire: the token, its scale and its slot."""
    return (width + _META[wire]) * jnp.dtype(wire).itemsize


def pack_messages(
    x: Shaped[Array, "Z D"], slot: Int[Array, " Z"], valid: Bool[Array, " Z"], wire: str
) -> Shaped[Array, "Z M"]:
    """Packs each token and its local slot into one row. Rows that are not valid become empty messages.

    The slot travels as two digits to base 128, which every wire type holds exactly.
    """
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
    """Reader of received messages.

    The experts call `tokens` on the rows that they need: most rows of a mailbox are empty.

    Attributes:
      width: Width `D` of a token.
      kind: Wire type, one of `WIRES`.
      dtype: Type in which `tokens` returns the tokens.
    """

    width: int
    kind: str
    dtype: Any

    def slots(self, rows: Shaped[Array, "Z M"]) -> Int[Array, " Z"]:
        """Local slot of each row, -1 for an empty row."""
        digits = rows[:, -2:].astype(jnp.int32)
        return digits[:, 0] * 128 + digits[:, 1] - 1

    def tokens(self, rows: Shaped[Array, "*Z M"]) -> Float[Array, "*Z D"]:
        """Token of each row, dequantised."""
        if self.kind != "int8":
            return rows[..., : self.width].astype(self.dtype)
        scale = jax.lax.bitcast_convert_type(rows[..., self.width : self.width + 4], jnp.float32)
        return dequantize(rows[..., : self.width], scale, self.dtype)
