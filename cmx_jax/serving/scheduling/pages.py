"""Who owns which page of a rank's cache: a free list, and nothing else."""

from cmx_jax.errors import CmxError


class PagePool:
    """The pages of one rank.

    * Every page is either free or held by exactly one sequence.
    * `take` gives all that was asked for, or raises and changes nothing.
    * The page freed last is given first.
    """

    def __init__(self, pages: int):
        self._free = list(range(pages - 1, -1, -1))
        self._held: set[int] = set()

    @property
    def free(self) -> int:
        return len(self._free)

    @property
    def held(self) -> int:
        return len(self._held)

    def take(self, count: int) -> list[int]:
        """`count` pages.

        Raises:
          CmxError: there are not as many.
        """
        if count < 0 or count > len(self._free):
            raise CmxError(f"{count} pages asked for, {len(self._free)} are free")
        rest = len(self._free) - count
        taken = self._free[rest:][::-1]
        del self._free[rest:]
        self._held.update(taken)
        return taken

    def give_back(self, pages: list[int]) -> None:
        """Frees pages.

        Raises:
          CmxError: one of them is not held, or named twice; nothing is freed then.
        """
        given = set(pages)
        if len(given) != len(pages) or not given <= self._held:
            raise CmxError(f"pages {pages} are not all held: freed twice?")
        self._held -= given
        self._free.extend(reversed(pages))


def pages_for(tokens: int, width: int) -> int:
    """Pages that hold `tokens` tokens at `width` a page."""
    return -(-tokens // width)
