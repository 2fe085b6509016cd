"""Arrays to INT8 arrays. Knows arrays, not models."""

from cmx_jax.quant.int8 import QTensor, dequantize, quantize_rows
from cmx_jax.quant.matmul import einsum

__all__ = ["QTensor", "dequantize", "einsum", "quantize_rows"]
