"""Arrays to INT8 arrays. Knows arrays, not models."""

from cmx_jax.quant.int8 import dequantize, quantize_rows

__all__ = ["dequantize", "quantize_rows"]
