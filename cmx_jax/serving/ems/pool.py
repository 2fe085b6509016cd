"""The caching pool for applications (the paper's MP SDK), and its consistent hashing (section 4.4.1)."""

import hashlib
import threading
import time
from bisect import bisect
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypedDict, TypeVar

from cmx_jax.errors import CmxError
from cmx_jax.serving.ems.background import Background
from cmx_jax.serving.ems.store import Hit, Store, StoreStats, block_name

T = TypeVar("T")
VIRTUAL_NODES = 128  # points per server: the servers' shares of the keys differ by about 1 / sqrt(128)


class Ring:
    """Global consistent hashing of keys to servers.

    Servers are at points of a circle; a key belongs to the server whose point comes next.
    Points depend on a server's own name only, so adding one server to `n` takes about `1 / (n + 1)` of the
    keys from all others, and no key moves between those.

    Raises:
      CmxError: There is no server, or a name is given twice.
    """

    def __init__(self, servers: Iterable[str], virtual_nodes: int = VIRTUAL_NODES):
        names = list(servers)
        if not names or len(set(names)) < len(names):
            raise CmxError(f"servers {', '.join(names) or 'none'}, expected one or more different ones")
        points = [(_digest(f"{name}#{i}".encode()), name) for name in names for i in range(virtual_nodes)]
        self._places, self._names = zip(*sorted(points), strict=True)

    def server(self, key: bytes) -> str:
        """Returns the name of a key's server."""
        return self._names[bisect(self._places, _digest(key)) % len(self._names)]


def _digest(data: bytes) -> bytes:
    return hashlib.sha256(data).digest()


class PoolStats(TypedDict):
    """Statistics of a pool since its start.

    Attributes:
      hits: Number of blocks read, by tier.
      misses: Number of blocks that were not found.
      stored: Number of puts after which the block was stored.
      lost: Number of puts after which it was not.
      dropped: Number of puts dropped because the queue was full or the pool was closed.
      failures: Number of operations that failed because a server could not be reached.
      skipped: Number of operations not sent to a server that had failed shortly before.
      waiting: Number of puts in the queue, or running.
      error: Last error of a queued put, or "".
      servers: Statistics of each server, or only `error` if it did not answer.
    """

    hits: dict[str, int]
    misses: int
    stored: int
    lost: int
    dropped: int
    failures: int
    skipped: int
    waiting: int
    error: str
    servers: dict[str, StoreStats]


@dataclass
class _Server:
    store: Store
    down_until: float = 0.0
    error: str = ""

    @property
    def down(self) -> bool:
        return time.monotonic() < self.down_until


class Pool:
    """Blocks on any number of servers; consistent hashing decides which server stores a block.

    * A cache may lose anything, so a server's failure is never an error for the caller: a get becomes a miss,
      a put is lost, both are counted, and the server is not asked again for `backoff` seconds.
    * `put_async` never waits. A full queue drops the put, which is counted.
    * Methods may be called from several threads.

    Args:
      stores: Stores by name; every process must use the same names, as they decide which server has which
        key. The pool closes the stores.
      queue: Largest number of puts that wait.
      backoff: Seconds for which a server that failed is not asked.

    Raises:
      CmxError: There is no store. Methods raise it for an invalid namespace or key (`store.block_name`).
    """

    def __init__(self, stores: Mapping[str, Store], *, queue: int = 256, backoff: float = 5.0):
        self._ring = Ring(stores)
        self._servers = {name: _Server(store) for name, store in stores.items()}
        self._backoff = backoff
        self._counts: Counter[str] = Counter()
        self._hits: Counter[str] = Counter()
        self._lock = threading.Lock()
        self._background = Background(queue)

    def get(self, namespace: str, key: bytes) -> bytes | None:
        """Returns a block, or None if there is none."""
        hit = self.fetch(namespace, key)
        return hit.payload if hit else None

    def fetch(self, namespace: str, key: bytes) -> Hit | None:
        """Returns a block with the tier that held it, or None if there is none."""
        hit = self._ask(key, None, lambda store: store.get(namespace, key))
        with self._lock:
            if hit:
                self._hits[hit.tier] += 1
            else:
                self._counts["misses"] += 1
        return hit

    def get_many(self, namespace: str, keys: Sequence[bytes]) -> list[bytes]:
        """Returns the blocks of the longest run of leading keys that are stored."""
        payloads = []
        for key in keys:
            if (payload := self.get(namespace, key)) is None:
                break
            payloads.append(payload)
        return payloads

    def match(self, namespace: str, keys: Sequence[bytes]) -> int:
        """Returns the number of leading keys that are stored now."""
        for n, key in enumerate(keys):
            if not self.exists(namespace, key):
                return n
        return len(keys)

    def exists(self, namespace: str, key: bytes) -> bool:
        """Returns whether a block is stored now."""
        return self._ask(key, False, lambda store: store.exists(namespace, key))

    def put(self, namespace: str, key: bytes, payload: bytes) -> bool:
        """Stores a block. Returns whether it is stored now."""
        stored = self._ask(key, False, lambda store: store.put(namespace, key, payload))
        self._count("stored" if stored else "lost")
        return stored

    def put_async(self, namespace: str, key: bytes, payload: bytes) -> bool:
        """Stores a block later. Returns False if the queue is full and the put was dropped."""
        block_name(namespace, key)
        queued = self._background.submit(lambda: self.put(namespace, key, payload))
        if not queued:
            self._count("dropped")
        return queued

    def delete(self, namespace: str, key: bytes) -> bool:
        """Removes a block. Returns whether it was stored."""
        return self._ask(key, False, lambda store: store.delete(namespace, key))

    def flush(self, timeout: float = 10.0) -> bool:
        """Waits for all queued puts. Returns False if that takes more than `timeout` seconds."""
        return self._background.flush(timeout)

    def stats(self) -> PoolStats:
        """Returns the pool's own counters, and the statistics of each server, or why it has none."""
        servers: dict[str, StoreStats] = {}
        for name, server in self._servers.items():
            stats = None if server.down else self._attempt(server, None, lambda store: store.stats())
            servers[name] = {"error": server.error} if stats is None else stats
        with self._lock:
            return {
                "hits": dict(self._hits),
                "misses": self._counts["misses"],
                "stored": self._counts["stored"],
                "lost": self._counts["lost"],
                "dropped": self._counts["dropped"],
                "failures": self._counts["failures"],
                "skipped": self._counts["skipped"],
                "waiting": self._background.waiting,
                "error": self._background.error,
                "servers": servers,
            }

    def close(self, timeout: float = 10.0) -> None:
        """Waits up to `timeout` seconds for queued puts, drops the rest, and closes the stores."""
        self._count("dropped", self._background.close(timeout))
        for server in self._servers.values():
            server.store.close()

    def _ask(self, key: bytes, default: T, operation: Callable[[Store], T]) -> T:
        server = self._servers[self._ring.server(key)]
        if server.down:
            self._count("skipped")
            return default
        return self._attempt(server, default, operation)

    def _attempt(self, server: _Server, default: T, operation: Callable[[Store], T]) -> T:
        try:
            return operation(server.store)
        except OSError as error:
            server.down_until = time.monotonic() + self._backoff
            server.error = str(error)
            self._count("failures")
            return default

    def _count(self, event: str, number: int = 1) -> None:
        with self._lock:
            self._counts[event] += number
