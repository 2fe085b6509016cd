"""The page pool never gives a page twice, whatever is asked of it."""

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from cmx_jax.errors import CmxError
from cmx_jax.serving.scheduling.pages import PagePool, pages_for

SIZE = 12


class Pool(RuleBasedStateMachine):
    """Held against a list of who owns what."""

    def __init__(self) -> None:
        super().__init__()
        self.pool = PagePool(SIZE)
        self.owned: list[list[int]] = []

    @rule(count=st.integers(0, SIZE + 2))
    def take(self, count: int) -> None:
        free = SIZE - sum(map(len, self.owned))
        if count > free:
            with pytest.raises(CmxError, match=f"{count} pages asked for, {free} are free"):
                self.pool.take(count)
        else:
            self.owned.append(self.pool.take(count))

    @precondition(lambda self: self.owned)
    @rule(data=st.data())
    def give_back(self, data: st.DataObject) -> None:
        pages = self.owned.pop(data.draw(st.integers(0, len(self.owned) - 1)))
        self.pool.give_back(pages)
        if pages:
            with pytest.raises(CmxError, match="freed twice"):
                self.pool.give_back(pages)

    @invariant()
    def every_page_has_one_owner(self) -> None:
        owned = [page for pages in self.owned for page in pages]
        assert len(set(owned)) == len(owned) == self.pool.held
        assert set(owned) <= set(range(SIZE))
        assert self.pool.free == SIZE - len(owned)


TestPool = Pool.TestCase


def test_naming_a_page_twice_frees_nothing() -> None:
    pool = PagePool(4)
    page, _ = pool.take(2)
    with pytest.raises(CmxError):
        pool.give_back([page, page])
    assert pool.held == 2


@pytest.mark.parametrize(("tokens", "width", "pages"), [(0, 16, 0), (1, 16, 1), (16, 16, 1), (17, 16, 2)])
def test_pages_for(tokens: int, width: int, pages: int) -> None:
    assert pages_for(tokens, width) == pages
