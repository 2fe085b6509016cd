"""Prompt blocks in the context cache (section 4.4.2), evicted in order of their last use."""

from collections import OrderedDict

from cmx_jax.analysis.simulate.workload import BLOCK


class PrefixCache:
    """An LRU cache of blocks of 512 tokens, shared by all instances of a supernode."""

    def __init__(self, blocks: int):
        self.blocks = blocks
        self._cached: OrderedDict[int, None] = OrderedDict()

    def match(self, ids: tuple[int, ...]) -> int:
        """Number of tokens of a prompt's cached prefix; does not count as a use."""
        for n, block in enumerate(ids):
            if block not in self._cached:
                return n * BLOCK
        return len(ids) * BLOCK

    def use(self, ids: tuple[int, ...]) -> None:
        """Touches or stores a prompt's blocks, the first one last: the end of a prompt is evicted first."""
        for block in reversed(ids):
            self._cached[block] = None
            self._cached.move_to_end(block)
        while len(self._cached) > self.blocks:
            self._cached.popitem(last=False)
