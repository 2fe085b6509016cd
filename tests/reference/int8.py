"""The dense reference with INT8 weights and products (W8A8), also with tokens sent to experts in INT8."""

import ml_dtypes
import numpy as np

from reference.dense import Array, Dense, route, sigmoid


def larger(x: Array) -> Array:
    """The next bfloat16."""
    return np.nextafter(x.astype(ml_dtypes.bfloat16), ml_dtypes.bfloat16(np.inf)).astype(x.dtype)


class Int8(Dense):
    """The dense reference with every INT8 product's operands rounded by hand."""

    def linear(self, name: str, x: Array) -> Array:
        if name.endswith(("kv_b_proj", "lm_head")):
            return super().linear(name, x)
        w = self.w[f"{name}.weight"]
        least = np.abs(w).max(axis=1, keepdims=True) / 127
        scale = least.astype(ml_dtypes.bfloat16).astype(x.dtype)
        scale = np.where(scale < least, larger(scale), scale)
        step = np.abs(x).max(axis=-1, keepdims=True) / 127
        return (np.rint(x / step) * step) @ (np.rint(w / scale) * scale).T


class Int8Wire(Int8):
    """The same where tokens go to experts in INT8, which changes nothing more, and return in bfloat16.

    The shared expert has slots, so its results travel as well.
    """

    def moe(self, name: str, x: Array) -> Array:
        y = returned(self.swiglu(f"{name}.shared_experts", x))
        for t, scores in enumerate(sigmoid(x @ self.w[f"{name}.gate.weight"].T)):
            experts, weights = route(scores, self.w[f"{name}.gate.e_score_correction_bias"], self.c)
            for e, weight in zip(experts, weights, strict=True):
                y[t] += weight * returned(self.swiglu(f"{name}.experts.{e}", x[t]))
        return y


def returned(x: Array) -> Array:
    """Results of an expert as they return."""
    return x.astype(ml_dtypes.bfloat16).astype(x.dtype)
