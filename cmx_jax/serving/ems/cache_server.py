"""One node's server of the memory pool (section 4.4.1): all blocks on disk, some of them in DRAM, too."""

import hashlib
import threading
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

from cmx_jax.errors import CmxError
from cmx_jax.serving.ems.disk import Disk
from cmx_jax.serving.ems.dram import Dram
from cmx_jax.serving.ems.store import Hit, Name, StoreStats, block_name, seal, unseal


class MPServer:
    """A `Store` of two tiers.

    * Every block is on disk; the most recently used ones are in DRAM, too. Each tier has its own LRU order
      and watermarks; a block evicted from the disk is removed from DRAM as well.
    * A block is verified whenever it is read. A damaged copy is dropped and counted; if it was the copy in
      DRAM, the block is read from disk.
    * A put that the disk does not take, or that is too large for the tier or its namespace's quota, is
      refused and counted. Stored blocks can still be read.
    * A namespace beyond its quota loses its own least recently used blocks. It loses blocks to another
      namespace only when the disk is full.
    * Files are read and written outside the lock, so that DRAM answers meanwhile.

    Args:
      folder: Folder of the disk tier, used by this server alone.
      dram: Size of the DRAM tier in bytes.
      disk: Size of the disk tier in bytes, counting whole files.
      quotas: Largest number of bytes on this server's disk, by namespace; other namespaces have no limit.
      low: Low watermark of both tiers, as a fraction of their size.
      high: High watermark of both tiers, as a fraction of their size.

    Raises:
      CmxError: The folder cannot be used, there is not enough shared memory, or sizes, watermarks or quotas
        are invalid. Methods raise it for an invalid namespace or key, or if the server is closed.
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
            block_name(namespace, bytes(32))
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
        """Returns a block, or None if there is no intact copy."""
        name = self._name(namespace, key)
        with self._lock:
            block = self._dram.get(name)
        if block is not None:
            if (payload := unseal(key, block)) is not None:
                return self._record_hit(name, Hit(payload, "dram"))
            with self._lock:
                self._dram.drop(name)
                self._counts["bad"] += 1
        with self._lock:
            stored = name in self._disk.lru
        if stored:
            block = self._disk.read(name)
            if block is not None and (payload := unseal(key, block)) is not None:
                return self._record_hit(name, Hit(payload, "disk"), block)
        with self._lock:
            self._counts["misses"] += 1
            if stored:
                self._verify(name)
        return None

    def put(self, namespace: str, key: bytes, payload: bytes) -> bool:
        """Stores a block, or marks a stored one as used. Returns whether it is stored now."""
        name = self._name(namespace, key)
        if self._touch_stored(name):
            return True
        block = seal(key, payload)
        limit = min(self._disk.lru.low, self._quotas.get(namespace, self._disk.lru.low))
        staged = self._disk.stage(name, block) if len(block) <= limit else None
        with self._lock:
            if staged is None:
                self._counts["refused"] += 1
                return False
            return self._publish(name, staged, block)

    def exists(self, namespace: str, key: bytes) -> bool:
        """Returns whether a block is stored; does not read it, nor mark it as used."""
        name = self._name(namespace, key)
        with self._lock:
            return name in self._disk.lru

    def delete(self, namespace: str, key: bytes) -> bool:
        """Removes a block. Returns whether it was stored."""
        name = self._name(namespace, key)
        with self._lock:
            stored = name in self._disk.lru
            if stored:
                self._remove(name, "deleted")
            return stored

    def stats(self) -> StoreStats:
        """Returns counters since the start, and the present content of the tiers and namespaces."""
        with self._lock:
            count, disk, dram = self._counts, self._disk, self._dram
            spaces = disk.lru.namespaces
            return {
                "hits": {"dram": count["dram"], "disk": count["disk"]},
                "misses": count["misses"],
                "bad": count["bad"],
                "puts": count["puts"],
                "duplicates": count["duplicates"],
                "refused": count["refused"],
                "deleted": count["deleted"],
                "evictions": {"dram": dram.evictions, "disk": count["evicted"], "quota": count["quota"]},
                "dram": {"bytes": dram.lru.bytes, "blocks": len(dram.lru), "segment": dram.segment},
                "disk": {"bytes": disk.lru.bytes, "blocks": len(disk.lru), "error": disk.error},
                "namespaces": {
                    space: {
                        "bytes": content["bytes"],
                        "blocks": content["blocks"],
                        "quota": self._quotas.get(space),
                    }
                    for space, content in spaces.items()
                },
            }

    def close(self) -> None:
        """Frees the DRAM tier; the disk tier's blocks stay for the next server."""
        with self._lock:
            if not self._closed:
                self._closed = True
                self._dram.close()
                self._disk.close()

    def _name(self, namespace: str, key: bytes) -> Name:
        if self._closed:
            raise CmxError("this cache server is closed")
        return block_name(namespace, key)

    def _record_hit(self, name: Name, hit: Hit, block: bytes | None = None) -> Hit:
        """Counts a hit and marks the block as used; copies a block that was read from disk to DRAM."""
        with self._lock:
            self._counts[hit.tier] += 1
            if name in self._disk.lru:  # it may have been evicted since it was read
                self._disk.touch(name)
                if block is not None and name not in self._dram.lru:
                    self._dram.put(name, block)
        return hit

    def _touch_stored(self, name: Name) -> bool:
        with self._lock:
            stored = name in self._disk.lru
            if stored:
                self._disk.touch(name)
                self._counts["duplicates"] += 1
            return stored

    def _publish(self, name: Name, staged: Path, block: bytes) -> bool:
        """Makes room for a staged block and publishes it. Returns whether it is stored now."""
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
        """Drops a damaged block, unless it was evicted or stored again since it was read."""
        block = self._disk.read(name) if name in self._disk.lru else None
        if block is not None and unseal(name[1], block) is None:
            self._remove(name, "bad")

    def _remove(self, name: Name, reason: str) -> None:
        self._disk.drop(name)
        self._dram.drop(name)
        self._counts[reason] += 1
