"""Faults of a checkpoint as lines for people: one line for a fault of a thousand tensors."""

import re
from collections.abc import Iterable


def grouped(faults: Iterable[str]) -> list[str]:
    """Returns one line for all faults that differ only in tensors and sizes: the first, with their number.

    Example:
      >>> grouped(["tensor a.b is I4", "tensor c.d is I4", "layer 3 is missing"])
      ['tensor a.b is I4 (and 1 more like it)', 'layer 3 is missing']
    """
    kinds: dict[str, list[str]] = {}
    for fault in faults:
        kinds.setdefault(re.sub(r"\S+\.\S+|\d+", "", fault), []).append(fault)
    return [
        lines[0] + (f" (and {len(lines) - 1} more like it)" if len(lines) > 1 else "")
        for lines in kinds.values()
    ]
