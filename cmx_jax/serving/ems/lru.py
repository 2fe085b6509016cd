"""Least-recently-used order of a tier's blocks, and the choice of blocks to evict."""

from collections import OrderedDict, defaultdict
from itertools import accumulate, takewhile

from cmx_jax.errors import CmxError
from cmx_jax.serving.ems.store import Name


class Lru:
    """Sizes of a tier's blocks in the order of their last use, over all and by namespace.

    * Above the high watermark, blocks are evicted until the low one is reached, so that not every put evicts.
    * This class evicts nothing: its methods return the blocks to evict.

    Attributes:
      low: Low watermark in bytes.
      high: High watermark in bytes.
      bytes: Total size of the blocks in bytes.

    Raises:
      CmxError: The capacity is less than 1, or `0 < low <= high <= 1` does not hold.
    """

    def __init__(self, capacity: int, low: float, high: float):
        if capacity < 1 or not 0 < low <= high <= 1:
            raise CmxError(
                f"tier of {capacity} bytes with watermarks {low:g} and {high:g}, expected bytes above zero "
                "and 0 < low <= high <= 1"
            )
        self.low, self.high = int(capacity * low), int(capacity * high)
        self.bytes = 0
        self._order: OrderedDict[Name, int] = OrderedDict()
        self._spaces: defaultdict[str, OrderedDict[Name, int]] = defaultdict(OrderedDict)
        self._used: defaultdict[str, int] = defaultdict(int)

    def __contains__(self, name: Name) -> bool:
        return name in self._order

    def __len__(self) -> int:
        return len(self._order)

    @property
    def namespaces(self) -> dict[str, dict[str, int]]:
        """Number of bytes and of blocks of each namespace that has blocks."""
        spaces = self._spaces.items()
        return {
            space: {"bytes": self._used[space], "blocks": len(blocks)} for space, blocks in spaces if blocks
        }

    def add(self, name: Name, size: int) -> None:
        """Adds a block that is not there yet, as the most recently used one."""
        self._order[name] = self._spaces[name[0]][name] = size
        self._used[name[0]] += size
        self.bytes += size

    def touch(self, name: Name) -> None:
        """Marks a block as the most recently used one."""
        self._order.move_to_end(name)
        self._spaces[name[0]].move_to_end(name)

    def drop(self, name: Name) -> None:
        """Forgets a block."""
        size = self._order.pop(name)
        del self._spaces[name[0]][name]
        self._used[name[0]] -= size
        self.bytes -= size

    def clear(self) -> None:
        """Forgets all blocks."""
        for name in list(self._order):
            self.drop(name)

    def oldest(self) -> Name:
        """Returns the least recently used block."""
        return next(iter(self._order))

    def crowded(self, size: int) -> list[Name]:
        """Returns the blocks to evict so that `size` more bytes fit below the watermarks, oldest first."""
        after = self.bytes + size
        return _oldest(self._order, after - self.low) if after > self.high else []

    def beyond(self, namespace: str, size: int, quota: int) -> list[Name]:
        """Returns the blocks to evict so that `size` more bytes fit the namespace's quota, oldest first."""
        return _oldest(self._spaces[namespace], self._used[namespace] + size - quota)


def _oldest(order: OrderedDict[Name, int], excess: int) -> list[Name]:
    """Returns the shortest run of oldest blocks whose sizes add up to at least `excess` bytes."""
    before = accumulate(order.values(), initial=0)  # bytes of all older blocks, for each block
    pairs = takewhile(lambda pair: pair[1] < excess, zip(order, before, strict=False))
    return [name for name, _ in pairs]
