"""Which prompt blocks the context cache holds (section 4.4.2): the one used longest ago leaves first."""

from collections import OrderedDict

from cmx_jax.analysis.simulate.workload import BLOCK


class PrefixCache:
    """An LRU cache of blocks of 512 tokens, shared by all instances of a supernode."""

    def __init__(self, blocks: int):
        self.blocks = blocks
        self._held: OrderedDict[int, None] = OrderedDict()

    def match(self, ids: tuple[int, ...]) -> int:
        """Tokens of a prompt's beginning that are here; nothing is touched."""
        for n, block in enumerate(ids):
            if block not in self._held:
                return n * BLOCK
        return len(ids) * BLOCK

    def use(self, ids: tuple[int, ...]) -> None:
        """Touches or stores a prompt's blocks, the first one last: a prompt's end leaves before its start."""
        for block in reversed(ids):
            self._held[block] = None
            self._held.move_to_end(block)
        while len(self._held) > self.blocks:
            self._held.popitem(last=False)
