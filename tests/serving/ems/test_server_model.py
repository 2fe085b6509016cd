"""A server against a plain dict: after any operations both hold the same blocks, and drop the same ones."""

import tempfile
from collections import OrderedDict
from pathlib import Path

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule
from serving.ems.stores import key, payload

from cmx_jax.serving.ems import MPServer
from cmx_jax.serving.ems.store import OVERHEAD

DISK, LOW, HIGH, QUOTA = 4000, 2800, 3600, 1200
SPACES, KEYS = st.sampled_from(["free", "limited"]), st.integers(0, 7)


class Node(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.folder = tempfile.TemporaryDirectory()
        self.held: OrderedDict[tuple[str, int], bytes] = OrderedDict()

    @initialize(dram=st.sampled_from([1500, 2 * DISK]))
    def start(self, dram: int) -> None:
        limits = {"dram": dram, "disk": DISK, "quotas": {"limited": QUOTA}, "low": 0.7, "high": 0.9}
        self.dram, self.node = dram, MPServer(Path(self.folder.name), **limits)

    def used(self, *spaces: str) -> int:
        return sum(len(data) + OVERHEAD for (space, _), data in self.held.items() if space in spaces)

    def evict(self, enough: int, *spaces: str) -> None:
        while self.used(*spaces) > enough:
            del self.held[next(name for name in self.held if name[0] in spaces)]

    @rule(space=SPACES, n=KEYS, size=st.integers(0, 1500))
    def put(self, space: str, n: int, size: int) -> None:
        block = size + OVERHEAD
        if (space, n) in self.held:
            self.held.move_to_end((space, n))
            expected = True
        elif block > (QUOTA if space == "limited" else LOW):
            expected = False
        else:
            if space == "limited":
                self.evict(QUOTA - block, "limited")
            if self.used("free", "limited") + block > HIGH:
                self.evict(LOW - block, "free", "limited")
            self.held[space, n] = payload(n, size)
            expected = True
        assert self.node.put(space, key(n), payload(n, size)) == expected

    @rule(space=SPACES, n=KEYS)
    def get(self, space: str, n: int) -> None:
        hit = self.node.get(space, key(n))
        assert (hit.payload if hit else None) == self.held.get((space, n))
        if hit:
            self.held.move_to_end((space, n))

    @rule(space=SPACES, n=KEYS)
    def delete(self, space: str, n: int) -> None:
        assert self.node.delete(space, key(n)) == (self.held.pop((space, n), None) is not None)

    @rule()
    def restart(self) -> None:
        self.node.close()
        self.start(self.dram)

    @invariant()
    def the_same_blocks_are_there(self) -> None:
        stored = {(s, n) for s in ("free", "limited") for n in range(8) if self.node.exists(s, key(n))}
        stats = self.node.stats()
        assert stored == set(self.held)
        assert stats["disk"]["bytes"] == self.used("free", "limited") <= HIGH
        assert stats["dram"]["bytes"] <= 0.9 * self.dram
        assert stats["namespaces"].get("limited", {"bytes": 0})["bytes"] == self.used("limited") <= QUOTA

    def teardown(self) -> None:
        self.node.close()
        self.folder.cleanup()


TestNode = Node.TestCase
TestNode.settings = settings(max_examples=40, stateful_step_count=30, deadline=None)
