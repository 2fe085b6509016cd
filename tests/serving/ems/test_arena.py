"""Partitions never overlap and no byte is lost, whatever is asked for."""

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from cmx_jax.errors import CmxError
from cmx_jax.serving.ems.arena import Arena

SIZE = 40


class Partitions(RuleBasedStateMachine):
    """Held against a list that has the owner of each byte."""

    def __init__(self) -> None:
        super().__init__()
        self.arena = Arena(SIZE)
        self.bytes: list[int | None] = [None] * SIZE
        self.held: dict[int, int] = {}

    def holes(self) -> list[tuple[int, int]]:
        """Offset and length of each run of free bytes."""
        runs, start = [], None
        for i, owner in enumerate([*self.bytes, 0]):
            if owner is None:
                start = i if start is None else start
            elif start is not None:
                runs.append((start, i - start))
                start = None
        return runs

    @rule(size=st.integers(1, SIZE + 1))
    def take(self, size: int) -> None:
        first = next((offset for offset, length in self.holes() if length >= size), None)
        assert self.arena.take(size) == first
        if first is not None:
            self.bytes[first : first + size] = [first] * size
            self.held[first] = size

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def give_back(self, data: st.DataObject) -> None:
        offset = data.draw(st.sampled_from(sorted(self.held)))
        size = self.held.pop(offset)
        self.arena.give_back(offset)
        self.bytes[offset : offset + size] = [None] * size
        with pytest.raises(CmxError, match="freed twice"):
            self.arena.give_back(offset)

    @invariant()
    def holes_are_joined_and_bytes_are_conserved(self) -> None:
        assert self.arena.free == self.bytes.count(None) == SIZE - sum(self.held.values())
        assert self.arena.largest == max((length for _, length in self.holes()), default=0)


TestPartitions = Partitions.TestCase


@pytest.mark.parametrize("size", [0, -1])
def test_arena_invalid_size(size: int) -> None:
    """A partition of less than one byte is refused."""
    with pytest.raises(CmxError, match=f"partition of {size} bytes"):
        Arena(8).take(size)
