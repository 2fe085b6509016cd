"""Mixed precision: keeps in floats the matrices to which INT8 does most harm (section 4.5)."""

import math
from collections.abc import Mapping


def keep_precision(
    errors: Mapping[str, float], sizes: Mapping[str, int], budget: float, *, threshold: float = 0.05
) -> frozenset[str]:
    """Chooses the tensors to keep in floats.

    Takes tensors in the order of their error per byte, largest first, and keeps each that still fits the
    budget.

    Args:
      errors: Relative output error of each tensor in INT8, without the tensors that are always kept.
      sizes: Bytes of each tensor in INT8, which are also the bytes that keeping it in bfloat16 adds.
      budget: Bytes that may be added, as a share of all `sizes`.
      threshold: Error above which a tensor is worth keeping.

    Raises:
      ValueError: A size is missing or not positive, or an error or the budget is not 0 or more.
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
