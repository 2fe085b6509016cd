"""Quantisation of arrays to INT8. Knows arrays, not models.

Letters in shapes: `T` rows of activations, `I` inputs and `O` outputs of a matrix `[I, O]`.
"""

from cmx_jax.quant.int8 import QTensor, dequantize, quantize_rows
from cmx_jax.quant.matmul import einsum

__all__ = ["QTensor", "dequantize", "einsum", "quantize_rows"]
