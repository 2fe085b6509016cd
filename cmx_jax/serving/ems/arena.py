"""Variable-length partitions of one stretch of memory (section 4.4.1): first fit, neighbours joined."""

from bisect import bisect

from cmx_jax.errors import CmxError


class Arena:
    """Allocator of the bytes `[0, capacity)`.

    * Every byte is in exactly one partition or hole.
    * No two holes touch: memory flows between sizes without compaction.
    * A partition is placed in the first hole that is large enough.
    """

    def __init__(self, capacity: int):
        self._holes = [(0, capacity)]  # offset, size; in order
        self._sizes: dict[int, int] = {}  # of each partition, by its offset

    @property
    def free(self) -> int:
        """Number of free bytes."""
        return sum(size for _, size in self._holes)

    @property
    def largest(self) -> int:
        """Size of the largest partition that can be allocated now."""
        return max((size for _, size in self._holes), default=0)

    def take(self, size: int) -> int | None:
        """Allocates a partition of `size` bytes. Returns its offset, or None if no hole is large enough.

        Raises:
          CmxError: `size` is less than 1.
        """
        if size < 1:
            raise CmxError(f"partition of {size} bytes, expected 1 or more")
        for i, (offset, hole) in enumerate(self._holes):
            if hole >= size:
                self._holes[i : i + 1] = [(offset + size, hole - size)] if hole > size else []
                self._sizes[offset] = size
                return offset
        return None

    def give_back(self, offset: int) -> None:
        """Frees a partition.

        Raises:
          CmxError: No partition starts at `offset`.
        """
        if offset not in self._sizes:
            raise CmxError(f"no partition starts at {offset}: freed twice?")
        end = offset + self._sizes.pop(offset)
        start = i = bisect(self._holes, (offset,))
        if i and sum(self._holes[i - 1]) == offset:
            offset, start = self._holes[i - 1][0], i - 1
        if i < len(self._holes) and self._holes[i][0] == end:
            end, i = sum(self._holes[i]), i + 1
        self._holes[start:i] = [(offset, end - offset)]
