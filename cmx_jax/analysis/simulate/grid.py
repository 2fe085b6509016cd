"""Points at which something slow is computed, and lines between them."""

from collections.abc import Callable


def around(x: float, unit: int, parts: int, most: int | None = None) -> tuple[int, int]:
    """The two points of a grid around `x`, or its first two; none lies behind `most`."""
    n = max(int(x / unit), 1)
    step = max((1 << n.bit_length() - 1) // parts, 1)
    low, high = n // step * step * unit, (n // step + 1) * step * unit
    return (low, high) if most is None else (min(low, most), min(high, most))


def straight(x: float, ends: tuple[int, int], of: Callable[[int], float]) -> float:
    """The line through `of` at two points; before the first of them, and behind a grid's last, level."""
    low, high = ends
    first = of(low)
    return first if x <= low or high == low else first + (of(high) - first) * (x - low) / (high - low)
