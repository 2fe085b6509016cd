"""Quantisation of arrays to INT8. Knows arrays, not models.

A matrix is `[I, O]`, inputs and outputs; activations are `[T, I]`. All letters stand in `cmx_jax.model`.
"""

from cmx_jax.quant.int8 import QTensor, dequantize, quantize_rows
from cmx_jax.quant.matmul import einsum

__all__ = ["QTensor", "dequantize", "einsum", "quantize_rows"]
