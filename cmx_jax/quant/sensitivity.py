"""Mixed precision: which matrices stay in floats because INT8 costs them most (section 4.5)."""

import math
from collections.abc import Mapping


def keep_precision(
    errors: Mapping[str, float], sizes: Mapping[str, int], budget: float, *, threshold: float = 0.05
) -> frozenset[str]:
    """The tensors to keep: the largest error for its bytes first, each that the budget still has room for.

    Args:
      errors: relative output error of each tensor in INT8. Those that are always kept are not among them.
      sizes: their bytes in INT8, which are also what keeping them in bfloat16 adds.
      budget: bytes that may be added, as a share of all `sizes`.
      threshold: a tensor is worth keeping above this error.

    Raises:
      ValueError: a size that is missing or not positive, an error or a budget that is not 0 or more.
    """
    for name, error in errors.items():
        if sizes.get(name, 0) <= 0:
            raise ValueError(f"{name} has {sizes.get(name)} bytes, expected a positive number")
        if math.isnan(error) or error < 0:
            raise ValueError(f"{name} has error {error}, expected 0 or more")
    if not budget >= 0:
        raise ValueError(f"budget {budget}, expected 0 or more")

    left, kept = budget * sum(sizes.values()), set()
    for name in sorted(errors, key=lambda n: (-errors[n] / sizes[n], n)):
        if errors[name] > threshold and sizes[name] <= left:
            left -= sizes[name]
            kept.add(name)
    return frozenset(kept)
