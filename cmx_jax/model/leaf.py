"""One tensor of the weights, described without its values."""

from dataclasses import dataclass, replace
from typing import Any, Literal

import jax.numpy as jnp

Stack = Literal["", "dense", "moe", "mtp"]


@dataclass(frozen=True)
class Leaf:
    """One tensor of one stack. A field in INT8 is two leaves of one path, of kinds `int8` and `scale`.

    Attributes:
      stack: Name of the stack; "" for tensors outside of stacks.
      path: Path of the field inside the stack, such as `attn.q_b`.
      shape: Shape, with the axis of layers.
      kind: Kind of the tensor, which decides its type.
      experts: True if the first axis is slots, which are split over expert ranks.
      inputs: Axes of a layer's (or expert's) matrix that are summed over; the others are output channels.
      scales: Type of the scales.
    """

    stack: Stack
    path: str
    shape: tuple[int, ...]
    kind: Literal["matrix", "norm", "router", "router_bias", "bias", "slots", "int8", "scale"] = "matrix"
    experts: bool = False
    inputs: tuple[int, ...] = (0,)
    scales: str = "bfloat16"

    @property
    def layers(self) -> int:
        """Number of layers of its stack (1 for tensors outside of stacks)."""
        return 1 if not self.stack else self.shape[1 if self.experts else 0]

    @property
    def piece_shape(self) -> tuple[int, ...]:
        """Shape of the part of one layer, or of one expert of one layer."""
        return self.shape[2:] if self.experts else self.shape[1:] if self.stack else self.shape

    def scale(self) -> "Leaf":
        """Returns the leaf of this leaf's scales."""
        lead = len(self.shape) - len(self.piece_shape)
        inputs = {lead + axis for axis in self.inputs}
        shape = tuple(1 if axis in inputs else n for axis, n in enumerate(self.shape))
        return replace(self, shape=shape, kind="scale")


def leaf_dtype(leaf: Leaf, dtype: Any) -> Any:
    """Type of a leaf: float32 for the router and its bias (the paper's mixed precision, section 4.5), int32
    for placement, `dtype` for floats in general."""
    fixed = {"slots": "int32", "int8": "int8", "scale": leaf.scales}
    if leaf.kind in fixed:
        return jnp.dtype(fixed[leaf.kind])
    return jnp.dtype(jnp.float32) if leaf.kind in ("router", "router_bias") else jnp.dtype(dtype)
