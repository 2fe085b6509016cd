"""The DRAM tier: blocks in one segment of shared memory (section 4.4.1)."""

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

SEGMENTS = Path("/dev/shm")  # folder in which Linux lists shared memory


class Dram:
    """Copies of blocks that the disk tier holds, too, so that losing a copy loses no block.

    The caller holds a lock, and no other live process has a segment of this name: an existing segment was
    left by a process that died, and is replaced. The segment is removed by `close`, or when the process ends.

    Attributes:
      segment: Name of the shared memory segment.
      lru: Sizes of the blocks, in the order of their last use.
      evictions: Number of blocks evicted so far.

    Raises:
      CmxError: There is not enough shared memory.
    """

    def __init__(self, segment: str, capacity: int, low: float, high: float):
        self.segment, self.lru = segment, Lru(capacity, low, high)
        self.evictions = 0
        self._arena = Arena(capacity)
        self._ranges: dict[Name, tuple[int, int]] = {}  # offset and end of each block
        shared = _create(segment, capacity)
        self._bytes = cast(memoryview, shared.buf)  # only a closed segment has None
        self._release = weakref.finalize(self, _free, shared)

    def get(self, name: Name) -> bytes | None:
        """Returns a copy of a block, or None. Marks the block as used, and does not verify it."""
        if name not in self._ranges:
            return None
        self.lru.touch(name)
        offset, end = self._ranges[name]
        return bytes(self._bytes[offset:end])

    def put(self, name: Name, block: bytes) -> None:
        """Adds a block that is not there yet, unless it is larger than the low watermark."""
        if len(block) > self.lru.low:
            return
        for victim in self.lru.crowded(len(block)):
            self._evict(victim)
        while (offset := self._arena.take(len(block))) is None:  # free space is fragmented
            self._evict(self.lru.oldest())
        end = offset + len(block)
        self._bytes[offset:end] = block
        self._ranges[name] = offset, end
        self.lru.add(name, len(block))

    def drop(self, name: Name) -> None:
        """Removes a block, if it is there."""
        if name in self._ranges:
            self._arena.give_back(self._ranges.pop(name)[0])
            self.lru.drop(name)

    def close(self) -> None:
        """Removes all blocks and the segment."""
        self.lru.clear()
        self._ranges.clear()
        self._release()

    def _evict(self, name: Name) -> None:
        self.drop(name)
        self.evictions += 1


def _create(segment: str, size: int) -> SharedMemory:
    with contextlib.suppress(FileNotFoundError):
        _free(SharedMemory(segment))
    try:
        shared = SharedMemory(segment, create=True, size=size)
    except OSError as error:
        raise CmxError(f"{size} bytes of shared memory cannot be had ({error.strerror})") from None
    if SEGMENTS.is_dir():  # without this check, writing to missing pages would kill the process
        try:
            with (SEGMENTS / segment).open("r+b") as file:
                os.posix_fallocate(file.fileno(), 0, size)
        except OSError as error:
            _free(shared)
            raise CmxError(
                f"{size} bytes of shared memory cannot be had ({error.strerror}): give the DRAM tier less"
            ) from None
    return shared


def _free(shared: SharedMemory) -> None:
    shared.close()
    with contextlib.suppress(FileNotFoundError):  # removed by the resource tracker of a dead process
        shared.unlink()
