"""Matrix products and convolutions of HLO: two FLOPs for each product that is summed."""

import math
import re
from functools import cache

import numpy as np

from cmx_jax.mesh.trace.hlo.parser import Instruction, arrays
from cmx_jax.mesh.trace.ops.contents import Product
from cmx_jax.mesh.trace.ops.scope import scopes
from cmx_jax.mesh.trace.ops.sizes import array_bytes, bits_of

PRODUCTS = frozenset(("dot", "scaled-dot", "convolution"))


def product_of(instruction: Instruction) -> Product:
    """Returns a product as one rank sees it, executed once; its type is the wider one of its inputs."""
    (result,) = arrays(instruction.type)
    left, right = (arrays(instruction.operand(number).type)[0] for number in (0, 1))
    dtype = max(left[0], right[0], key=bits_of)
    if instruction.op == "convolution":
        products = _convolution(instruction, result[1], left[1], right[1])
    else:
        contracted = instruction.attribute(r"lhs_contracting_dims=\{([\d,]*)\}") or ""
        summed = math.prod(left[1][int(axis)] for axis in contracted.split(",") if axis)
        products = math.prod(result[1]) * summed
    return Product(
        dtype=dtype,
        flops=2 * products,
        bytes=sum(array_bytes(shape, kind) for kind, shape in (left, right, result)),
        count=1,
        scope=scopes(instruction.op_name()),
        known=1,
    )


def _convolution(instruction: Instruction, out: tuple, left: tuple, right: tuple) -> int:
    """Returns the number of products of a convolution, without those with padding or dilation zeros.

    Compilers write batched matrix products in this form: a batch axis is a window that meets only itself.
    """
    labels = instruction.attribute(r"dim_labels=(\w+_\w+->\w+)") or "bf_io->bf"
    of_left, of_right, of_out = re.split(r"_|->", labels)
    window = instruction.attribute(r"window=\{([^}]*)\}") or ""
    fields = dict(item.split("=") for item in window.split())
    products = out[of_out.index("b")] * math.prod(right[of_right.index(label)] for label in "io")
    spatial = sorted(label for label in of_left if label.isdigit())
    for label in spatial:
        axis_fields = {key: value.split("x")[int(label)] for key, value in fields.items()}
        low = int(axis_fields.get("pad", "0_0").split("_")[0])
        stride, holes, spread = (
            int(axis_fields.get(key, 1)) for key in ("stride", "lhs_dilate", "rhs_dilate")
        )
        sizes = (left[of_left.index(label)], right[of_right.index(label)], out[of_out.index(label)])
        products *= _meetings(*sizes, stride, low, holes, spread)
    return products


@cache
def _meetings(size: int, kernel: int, out: int, stride: int, low: int, holes: int, spread: int) -> int:
    """Returns the number of pairs of a window position and an element under it, along one axis."""
    if holes == 1 and low <= 0 and (out - 1) * stride + (kernel - 1) * spread - low < size:
        return kernel * out
    starts = np.arange(out) * stride - low
    pairs = 0
    for step in range(kernel):
        index = starts + step * spread
        pairs += int(((index >= 0) & (index % holes == 0) & (index // holes < size)).sum())
    return pairs
