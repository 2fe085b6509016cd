"""Products with weights that are floats or INT8: W8A8 as in section 4.5.

With INT8 weights the activations are rounded to INT8 as well, with one scale per token. Products are summed
as INT32, and the sum is multiplied by both scales.
"""

from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Bool

from cmx_jax.quant.int8 import QTensor, quantize_rows


@dataclass(frozen=True)
class Observed:
    """A weight whose products record their activations.

    Attributes:
      value: The weight.
      path: Path of the weight, the key in `seen`.
      seen: Recorded activations, with the summed axes flattened to one.
    """

    value: Any
    path: str
    seen: dict[str, Any]


def einsum(
    spec: str, x: Array, w: Array | QTensor | Observed, valid: Bool[Array, "..."] | None = None
) -> Array:
    """Computes `jnp.einsum(spec, x, w)` with a weight that is floats or INT8, in the type of `x`.

    Args:
      spec: Einsum of two operands. The summed axes are the last of `x`, and a scale of `w` holds along them.
      x: Activations.
      w: Weight.
      valid: True for valid rows of `x`; its shape is that of `x` without the summed axes. Other rows may hold
        anything. None means that all are valid.

    Raises:
      ValueError: One scale does not hold along all summed axes.
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
    mask = jnp.ones(rows.shape[:-1], bool) if valid is None else valid
    q, by_token = quantize_rows(rows, mask)
    single = rows.size == rows.shape[-1] and a[0] not in b  # XLA:CPU has INT8 kernels for two rows and more
    q = jnp.concatenate([q, jnp.zeros_like(q)]) if single else q
    q = q.reshape(-1, *x.shape[1:])
    y = jnp.einsum(f"{a},{b}->{out}", q, w.q, preferred_element_type=jnp.dtype(jnp.int32))
    y = (y[:1] if single else y).astype(jnp.float32)
    y = y * _aligned(by_token, kept, out) * _aligned(w.scale.astype(jnp.float32), b, out)
    return y.astype(x.dtype)


def _labels(spec: str, rank: int) -> tuple[str, str, str]:
    """Letters of both operands and of the result, with capitals in place of `...`."""
    operands, out = spec.split("->")
    a, b = operands.split(",")
    capitals = "ABCDEFG"[: rank - len(a.replace("...", ""))]
    return a.replace("...", capitals), b, out.replace("...", capitals)


def _aligned(x: Array, labels: str, to: str) -> Array:
    """Brings the axes of `x` into the order of `to`. Axes that `to` lacks have length 1 and are removed."""
    removed = tuple(i for i, label in enumerate(labels) if label not in to)
    kept = [label for label in labels if label in to]
    x = jnp.transpose(jnp.squeeze(x, removed), [kept.index(label) for label in to if label in kept])
    return jnp.expand_dims(x, tuple(i for i, label in enumerate(to) if label not in kept))
