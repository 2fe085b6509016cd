"""The upper tier: blocks in one segment of shared memory (section 4.4.1)."""

import contextlib
import os
import weakref
from multiprocessing.shared_memory import SharedMemory
from pathlib import Path
from typing import cast

from cmx_jax.errors import CmxError
from cmx_jax.serving.ems.arena import Arena
from cmx_jax.serving.ems.lru import Lru
from cmx_jax.serving.ems.store import Name

SEGMENTS = Path("/dev/shm")  # where Linux shows them


class Dram:
    """Copies of blocks that the disk tier holds too: what is lost here is found there.

    The caller holds a lock, and nobody else has a segment of this name: one that exists was left by a process
    that died, and is replaced. The segment is removed by `close`, or when the process ends.

    Raises:
      CmxError: there is not as much shared memory.
    """

    def __init__(self, segment: str, capacity: int, low: float, high: float):
        self.segment, self.lru = segment, Lru(capacity, low, high)
        self.evictions = 0
        self._arena = Arena(capacity)
        self._at: dict[Name, tuple[int, int]] = {}  # offset, end
        shared = _created(segment, capacity)
        self._bytes = cast(memoryview, shared.buf)  # None of a closed one
        self._release = weakref.finalize(self, _released, shared)

    def get(self, name: Name) -> bytes | None:
        """A copy of a block as it lies there, now the newest; None if there is none. Nothing is verified."""
        if name not in self._at:
            return None
        self.lru.touch(name)
        offset, end = self._at[name]
        return bytes(self._bytes[offset:end])

    def put(self, name: Name, block: bytes) -> None:
        """Keeps a copy of a block that is not there, if it is not larger than the low watermark."""
        if len(block) > self.lru.low:
            return
        for victim in self.lru.crowded(len(block)):
            self._evict(victim)
        while (offset := self._arena.take(len(block))) is None:  # there is room, but in pieces
            self._evict(self.lru.oldest())
        end = offset + len(block)
        self._bytes[offset:end] = block
        self._at[name] = offset, end
        self.lru.add(name, len(block))

    def drop(self, name: Name) -> None:
        """Forgets a block, if it is there."""
        if name in self._at:
            self._arena.give_back(self._at.pop(name)[0])
            self.lru.drop(name)

    def close(self) -> None:
        """Forgets all blocks and removes the segment."""
        self.lru.clear()
        self._at.clear()
        self._release()

    def _evict(self, name: Name) -> None:
        self.drop(name)
        self.evictions += 1


def _created(segment: str, size: int) -> SharedMemory:
    with contextlib.suppress(FileNotFoundError):
        _released(SharedMemory(segment))
    try:
        shared = SharedMemory(segment, create=True, size=size)
    except OSError as error:
        raise CmxError(f"{size} bytes of shared memory cannot be had ({error.strerror})") from None
    if SEGMENTS.is_dir():  # pages that are missing would end the process when they are written
        try:
            with (SEGMENTS / segment).open("r+b") as file:
                os.posix_fallocate(file.fileno(), 0, size)
        except OSError as error:
            _released(shared)
            raise CmxError(
                f"{size} bytes of shared memory cannot be had ({error.strerror}): give the DRAM tier less"
            ) from None
    return shared


def _released(shared: SharedMemory) -> None:
    shared.close()
    with contextlib.suppress(FileNotFoundError):  # the resource tracker of a process that died was here
        shared.unlink()
