"""HLO's matrix products and convolutions: two FLOPs for each product that is summed."""

import math
import re
from functools import cache

import numpy as np
from jax import numpy as jnp

from cmx_jax.mesh.trace.hlo.text import Instruction, arrays
from cmx_jax.mesh.trace.ops.contents import Product
from cmx_jax.mesh.trace.ops.scope import scopes

PRODUCTS = frozenset(("dot", "scaled-dot", "convolution"))


def product_of(instruction: Instruction) -> Product:
    """As one rank sees it, executed once; its type is the wider, if its inputs have two."""
    (result,) = arrays(instruction.type)
    left, right = (arrays(instruction.operand(number).type)[0] for number in (0, 1))
    sizes = {array: math.prod(array[1]) * jnp.dtype(array[0]).itemsize for array in (left, right, result)}
    dtype = max(left[0], right[0], key=lambda name: jnp.dtype(name).itemsize)
    if instruction.op == "convolution":
        products = _convolution(instruction, result[1], left[1], right[1])
    else:
        contracted = instruction.attribute(r"lhs_contracting_dims=\{([\d,]*)\}") or ""
        summed = math.prod(left[1][int(axis)] for axis in contracted.split(",") if axis)
        products = math.prod(result[1]) * summed
    moved = sum(sizes[array] for array in (left, right, result))
    return Product(dtype, 2 * products, moved, 1, scopes(instruction.op_name()), 1)


def _convolution(instruction: Instruction, out: tuple, left: tuple, right: tuple) -> int:
    """Products of a convolution: those with padding and with holes between elements are none.

    Compilers write batched matrix products in this form, a batch axis as a window that meets itself only.
    """
    labels = instruction.attribute(r"dim_labels=(\w+_\w+->\w+)") or "bf_io->bf"
    of_left, of_right, of_out = re.split(r"_|->", labels)
    window = instruction.attribute(r"window=\{([^}]*)\}") or ""
    fields = dict(item.split("=") for item in window.split())
    products = out[of_out.index("b")] * math.prod(right[of_right.index(label)] for label in "io")
    spatial = sorted(label for label in of_left if label.isdigit())
    for label in spatial:
        own = {key: value.split("x")[int(label)] for key, value in fields.items()}
        low = int(own.get("pad", "0_0").split("_")[0])
        stride, holes, spread = (int(own.get(key, 1)) for key in ("stride", "lhs_dilate", "rhs_dilate"))
        sizes = (left[of_left.index(label)], right[of_right.index(label)], out[of_out.index(label)])
        products *= _meetings(*sizes, stride, low, holes, spread)
    return products


@cache
def _meetings(size: int, kernel: int, out: int, stride: int, low: int, holes: int, spread: int) -> int:
    """Pairs of a place of the window and an element under it, along one axis."""
    if holes == 1 and low <= 0 and (out - 1) * stride + (kernel - 1) * spread - low < size:
        return kernel * out
    places = np.arange(out) * stride - low
    found = 0
    for step in range(kernel):
        at = places + step * spread
        found += int(((at >= 0) & (at % holes == 0) & (at // holes < size)).sum())
    return found
