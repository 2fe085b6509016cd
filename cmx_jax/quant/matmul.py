"""Products with weights that are floats or INT8: W8A8 as in section 4.5.

INT8 weights meet activations that are rounded to INT8 on the spot, one scale a token; products are summed as
INT32, and both scales are multiplied in behind the sum.
"""

from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Bool

from cmx_jax.quant.int8 import QTensor, quantize_rows


@dataclass(frozen=True)
class Observed:
    """A weight of which is noted what it is multiplied with: `seen[path]` is that, summed axes flattened."""

    value: Any
    path: str
    seen: dict[str, Any]


def einsum(
    spec: str, x: Array, w: Array | QTensor | Observed, valid: Bool[Array, "..."] | None = None
) -> Array:
    """`jnp.einsum(spec, x, w)` of a weight that is floats or INT8, in the type of `x`.

    Args:
      spec: of two operands; the summed axes are the last of `x`, and a scale of `w` holds along them.
      x: activations.
      w: the weight.
      valid: which rows of `x` are there (its shape without the summed axes); others may hold anything. None:
        all.

    Raises:
      ValueError: other axes are summed than a scale holds for.
    """
    if not isinstance(w, QTensor | Observed):
        return jnp.einsum(spec, x, w)
    a, b, out = _labels(spec, x.ndim)
    kept = "".join(label for label in a if label in out)
    summed = a.removeprefix(kept)
    if isinstance(w, Observed):
        w.seen[w.path] = x.reshape(*x.shape[: len(kept)], -1)
        return jnp.einsum(spec, x, w.value)
    if any(label in out or w.scale.shape[b.index(label)] > 1 for label in summed):
        raise ValueError(f"{spec} with scales {w.scale.shape}: one must hold along the last axes of {a}")
    rows = x.reshape(*x.shape[: len(kept)], -1)
    there = jnp.ones(rows.shape[:-1], bool) if valid is None else valid
    q, by_token = quantize_rows(rows, there)
    one = rows.size == rows.shape[-1] and a[0] not in b  # XLA:CPU has INT8 kernels for two rows and more
    q = jnp.concatenate([q, jnp.zeros_like(q)]) if one else q
    q = q.reshape(-1, *x.shape[1:])
    y = jnp.einsum(f"{a},{b}->{out}", q, w.q, preferred_element_type=jnp.dtype(jnp.int32))
    y = (y[:1] if one else y).astype(jnp.float32)
    y = y * _aligned(by_token, kept, out) * _aligned(w.scale.astype(jnp.float32), b, out)
    return y.astype(x.dtype)


def _labels(spec: str, rank: int) -> tuple[str, str, str]:
    """The letters of both operands and of the result; `...` stands for capitals."""
    operands, out = spec.split("->")
    a, b = operands.split(",")
    more = "ABCDEFG"[: rank - len(a.replace("...", ""))]
    return a.replace("...", more), b, out.replace("...", more)


def _aligned(x: Array, labels: str, to: str) -> Array:
    """`x` with its axes in the order of `to`; axes that `to` lacks have length 1 and go."""
    gone = tuple(i for i, label in enumerate(labels) if label not in to)
    left = [label for label in labels if label in to]
    x = jnp.transpose(jnp.squeeze(x, gone), [left.index(label) for label in to if label in left])
    return jnp.expand_dims(x, tuple(i for i, label in enumerate(to) if label not in left))
