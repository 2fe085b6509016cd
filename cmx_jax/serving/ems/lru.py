"""Which blocks a tier holds, and which of them leaves next: the one used longest ago."""

from collections import OrderedDict, defaultdict
from itertools import accumulate, takewhile

from cmx_jax.errors import CmxError
from cmx_jax.serving.ems.store import Name


class Lru:
    """Sizes of a tier's blocks in the order of their last use, as a whole and by namespace.

    * Above the high watermark blocks leave until the low one is reached, so that not every put evicts.
    * Nothing is evicted here: methods name who has to leave.

    Raises:
      CmxError: the capacity is not above zero, or not 0 < low <= high <= 1.
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
        """Bytes and blocks of each namespace that has some."""
        spaces = self._spaces.items()
        return {space: {"bytes": self._used[space], "blocks": len(held)} for space, held in spaces if held}

    def add(self, name: Name, size: int) -> None:
        """A block that was not there, as the newest."""
        self._order[name] = self._spaces[name[0]][name] = size
        self._used[name[0]] += size
        self.bytes += size

    def touch(self, name: Name) -> None:
        """Makes a block the newest."""
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
        """The block used longest ago."""
        return next(iter(self._order))

    def crowded(self, size: int) -> list[Name]:
        """Who leaves so that `size` bytes more fit below the watermarks, oldest first."""
        after = self.bytes + size
        return _leaving(self._order, after - self.low) if after > self.high else []

    def beyond(self, namespace: str, size: int, quota: int) -> list[Name]:
        """Who of a namespace leaves so that `size` bytes more are within its quota, oldest first."""
        return _leaving(self._spaces[namespace], self._used[namespace] + size - quota)


def _leaving(order: OrderedDict[Name, int], excess: int) -> list[Name]:
    """The shortest run of oldest blocks that holds `excess` bytes."""
    before = accumulate(order.values(), initial=0)  # bytes of those older than each
    pairs = takewhile(lambda pair: pair[1] < excess, zip(order, before, strict=False))
    return [name for name, _ in pairs]
