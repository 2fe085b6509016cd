"""Allocates the pages of a rank's cache from a free list."""

from cmx_jax.errors import CmxError


class PagePool:
    """The pages of one rank.

    * Every page is either free or held by exactly one sequence.
    * `take` allocates all pages of a call, or raises and changes nothing.
    * The page freed last is allocated first.
    """

    def __init__(self, pages: int):
        self._free = list(range(pages - 1, -1, -1))
        self._held: set[int] = set()

    @property
    def free(self) -> int:
        """Number of free pages."""
        return len(self._free)

    @property
    def held(self) -> int:
        """Number of allocated pages."""
        return len(self._held)

    def take(self, count: int) -> list[int]:
        """Allocates `count` pages.

        Raises:
          CmxError: Fewer pages are free.
        """
        if count < 0 or count > len(self._free):
            raise CmxError(f"{count} pages asked for, {len(self._free)} are free")
        start = len(self._free) - count
        taken = self._free[start:][::-1]
        del self._free[start:]
        self._held.update(taken)
        return taken

    def give_back(self, pages: list[int]) -> None:
        """Frees pages.

        Raises:
          CmxError: A page is not held, or appears twice. Nothing is freed then.
        """
        unique = set(pages)
        if len(unique) != len(pages) or not unique <= self._held:
            raise CmxError(f"pages {pages} are not all held: freed twice?")
        self._held -= unique
        self._free.extend(reversed(pages))


def pages_for(tokens: int, width: int) -> int:
    """Returns the number of pages for `tokens` tokens at `width` tokens per page."""
    return -(-tokens // width)
