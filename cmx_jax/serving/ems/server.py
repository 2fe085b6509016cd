"""The memory pool's server of one node (section 4.4.1): blocks in DRAM, all of them on disk too."""

import hashlib
import threading
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cmx_jax.errors import CmxError
from cmx_jax.serving.ems.block import opened, sealed
from cmx_jax.serving.ems.disk import Disk
from cmx_jax.serving.ems.dram import Dram
from cmx_jax.serving.ems.store import Hit, Name, named


class MPServer:
    """A `Store` of two tiers.

    * Every block is on disk; some are in DRAM too: those that were used last. Each tier has its own LRU order
      and watermarks; a block that leaves the disk leaves DRAM with it.
    * A block is verified whenever it is read. A damaged copy is dropped and counted; if it was the one in
      DRAM, the one on disk answers.
    * A put that the disk does not take, or that is too large for the tier or its namespace's quota, is
      refused and counted. What is there can still be read.
    * Beyond its quota a namespace loses its own blocks, those used longest ago. Only a full disk makes it
      lose blocks for another one.
    * Files are read and written outside the lock, so that DRAM answers meanwhile.

    Args:
      folder: of the disk tier, for this server alone.
      dram: bytes of the DRAM tier.
      disk: bytes of the disk tier, of files as a whole.
      quotas: bytes that a namespace may have on this server's disk; others have no limit.
      low, high: watermarks, of both tiers.

    Raises:
      CmxError: the folder, or as much shared memory, cannot be had; sizes, watermarks or quotas make no
        sense. Of methods: the namespace or key cannot be one, or the server is closed.
    """

    def __init__(
        self,
        folder: Path,
        *,
        dram: int,
        disk: int,
        quotas: Mapping[str, int] | None = None,
        low: float = 0.85,
        high: float = 0.95,
    ):
        self._quotas = dict(quotas or {})
        for namespace, quota in self._quotas.items():
            named(namespace, bytes(32))
            if quota < 1:
                raise CmxError(f"quota of {namespace} is {quota} bytes, expected 1 or more")
        self._disk = Disk(folder, disk, low, high)
        try:
            segment = f"cmx_{hashlib.sha256(self._disk.identity.encode()).hexdigest()[:16]}"
            self._dram = Dram(segment, dram, low, high)
        except CmxError:
            self._disk.close()
            raise
        self._lock = threading.Lock()
        self._counts: Counter[str] = Counter()
        self._closed = False

    def get(self, namespace: str, key: bytes) -> Hit | None:
        """A block, None if there is none that is whole."""
        name = self._named(namespace, key)
        with self._lock:
            block = self._dram.get(name)
        if block is not None:
            if (payload := opened(key, block)) is not None:
                return self._found(name, Hit(payload, "dram"))
            with self._lock:
                self._dram.drop(name)
                self._counts["bad"] += 1
        with self._lock:
            stored = name in self._disk.lru
        if stored:
            block = self._disk.read(name)
            if block is not None and (payload := opened(key, block)) is not None:
                return self._found(name, Hit(payload, "disk"), block)
        with self._lock:
            self._counts["misses"] += 1
            if stored:
                self._verify(name)
        return None

    def put(self, namespace: str, key: bytes, payload: bytes) -> bool:
        """Whether the block is there now; one that was there already becomes the newest."""
        name = self._named(namespace, key)
        if self._present(name):
            return True
        block = sealed(key, payload)
        limit = min(self._disk.lru.low, self._quotas.get(namespace, self._disk.lru.low))
        staged = self._disk.stage(name, block) if len(block) <= limit else None
        with self._lock:
            if staged is None:
                self._counts["refused"] += 1
                return False
            return self._publish(name, staged, block)

    def exists(self, namespace: str, key: bytes) -> bool:
        """Whether a block is there; it is not read, nor made newer."""
        name = self._named(namespace, key)
        with self._lock:
            return name in self._disk.lru

    def delete(self, namespace: str, key: bytes) -> bool:
        """Removes a block; whether there was one."""
        name = self._named(namespace, key)
        with self._lock:
            there = name in self._disk.lru
            if there:
                self._remove(name, "deleted")
            return there

    def stats(self) -> dict[str, Any]:
        """Counters since the start, and what the tiers and namespaces hold now, in bytes and blocks."""
        with self._lock:
            count, disk, dram = self._counts, self._disk, self._dram
            spaces = disk.lru.namespaces
            return {
                "hits": {"dram": count["dram"], "disk": count["disk"]},
                **{
                    what: count[what]
                    for what in ("misses", "bad", "puts", "duplicates", "refused", "deleted")
                },
                "evictions": {"dram": dram.evictions, "disk": count["evicted"], "quota": count["quota"]},
                "dram": {"bytes": dram.lru.bytes, "blocks": len(dram.lru), "segment": dram.segment},
                "disk": {"bytes": disk.lru.bytes, "blocks": len(disk.lru), "error": disk.error},
                "namespaces": {s: {**held, "quota": self._quotas.get(s)} for s, held in spaces.items()},
            }

    def close(self) -> None:
        """Removes the DRAM tier; the disk tier's blocks stay for the next server."""
        with self._lock:
            if not self._closed:
                self._closed = True
                self._dram.close()
                self._disk.close()

    def _named(self, namespace: str, key: bytes) -> Name:
        if self._closed:
            raise CmxError("this cache server is closed")
        return named(namespace, key)

    def _found(self, name: Name, hit: Hit, block: bytes | None = None) -> Hit:
        """Counts a hit and makes the block the newest; one that DRAM has not is copied there."""
        with self._lock:
            self._counts[hit.tier] += 1
            if name in self._disk.lru:  # it may have left since it was read
                self._disk.touch(name)
                if block is not None and name not in self._dram.lru:
                    self._dram.put(name, block)
        return hit

    def _present(self, name: Name) -> bool:
        with self._lock:
            there = name in self._disk.lru
            if there:
                self._disk.touch(name)
                self._counts["duplicates"] += 1
            return there

    def _publish(self, name: Name, staged: Path, block: bytes) -> bool:
        """Makes room for a staged block and puts it in its place; whether it is there then."""
        if name in self._disk.lru or self._closed:
            self._disk.discard(staged)
            return not self._closed  # another thread was faster
        if quota := self._quotas.get(name[0]):
            for victim in self._disk.lru.beyond(name[0], len(block), quota):
                self._remove(victim, "quota")
        for victim in self._disk.lru.crowded(len(block)):
            self._remove(victim, "evicted")
        if not self._disk.publish(name, staged, len(block)):
            self._counts["refused"] += 1
            return False
        self._dram.put(name, block)
        self._counts["puts"] += 1
        return True

    def _verify(self, name: Name) -> None:
        """Drops a block that is damaged, and was not just evicted or put anew while it was read."""
        block = self._disk.read(name) if name in self._disk.lru else None
        if block is not None and opened(name[1], block) is None:
            self._remove(name, "bad")

    def _remove(self, name: Name, why: str) -> None:
        self._disk.drop(name)
        self._dram.drop(name)
        self._counts[why] += 1
