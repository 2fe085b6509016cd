"""The caching pool as an application sees it (the paper's MP SDK, section 4.4.1)."""

import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from cmx_jax.serving.ems.background import Background
from cmx_jax.serving.ems.ring import Ring
from cmx_jax.serving.ems.store import Hit, Store, named

T = TypeVar("T")

COUNTS = ("misses", "stored", "lost", "dropped", "failures", "skipped")


@dataclass
class _Server:
    store: Store
    down_until: float = 0.0
    error: str = ""

    @property
    def down(self) -> bool:
        return time.monotonic() < self.down_until


class Pool:
    """Blocks on any number of servers; consistent hashing says where each one is.

    * A cache may lose anything, so no failure of a server is the caller's: a get of it is a miss, a put is
      lost, both are counted, and the server is left alone for `backoff` seconds.
    * `put_async` never waits. A full queue drops the put, which is counted.
    * Methods may be called from several threads.

    Args:
      stores: by name; the same names everywhere, as they say who has which key. The pool closes them.
      queue: puts that may wait.
      backoff: seconds in which a server that failed is not asked.

    Raises:
      CmxError: there is no store. Of methods: a namespace or key cannot be one (`store.named`).
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
        """A block, None if there is none."""
        hit = self.fetch(namespace, key)
        return hit.payload if hit else None

    def fetch(self, namespace: str, key: bytes) -> Hit | None:
        """A block with the tier that it lay in, None if there is none."""
        hit = self._ask(key, None, lambda store: store.get(namespace, key))
        with self._lock:
            if hit:
                self._hits[hit.tier] += 1
            else:
                self._counts["misses"] += 1
        return hit

    def get_many(self, namespace: str, keys: Sequence[bytes]) -> list[bytes]:
        """The longest run of leading keys that are there, fetched."""
        found = []
        for key in keys:
            if (payload := self.get(namespace, key)) is None:
                break
            found.append(payload)
        return found

    def match(self, namespace: str, keys: Sequence[bytes]) -> int:
        """How many leading keys are there now."""
        for n, key in enumerate(keys):
            if not self.exists(namespace, key):
                return n
        return len(keys)

    def exists(self, namespace: str, key: bytes) -> bool:
        """Whether a block is there now."""
        return self._ask(key, False, lambda store: store.exists(namespace, key))

    def put(self, namespace: str, key: bytes, payload: bytes) -> bool:
        """Whether the block is there now."""
        stored = self._ask(key, False, lambda store: store.put(namespace, key, payload))
        self._count("stored" if stored else "lost")
        return stored

    def put_async(self, namespace: str, key: bytes, payload: bytes) -> bool:
        """Puts a block later; False if too many wait, and it was dropped."""
        named(namespace, key)
        queued = self._background.submit(lambda: self.put(namespace, key, payload))
        if not queued:
            self._count("dropped")
        return queued

    def delete(self, namespace: str, key: bytes) -> bool:
        """Removes a block; whether there was one."""
        return self._ask(key, False, lambda store: store.delete(namespace, key))

    def flush(self, timeout: float = 10.0) -> bool:
        """Waits for all puts; whether they were done within `timeout` seconds."""
        return self._background.flush(timeout)

    def stats(self) -> dict[str, Any]:
        """The pool's own counters, and what each server says of itself, or why it does not."""
        servers = {}
        for name, server in self._servers.items():
            held = None if server.down else self._attempt(server, None, lambda store: store.stats())
            servers[name] = {"error": server.error} if held is None else held
        with self._lock:
            counts = {what: self._counts[what] for what in COUNTS}
            hits, background = dict(self._hits), self._background
        own = {"hits": hits, **counts, "waiting": background.waiting, "error": background.error}
        return {**own, "servers": servers}

    def close(self, timeout: float = 10.0) -> None:
        """Waits up to `timeout` seconds for puts, drops the rest, and closes the stores."""
        self._count("dropped", self._background.close(timeout))
        for server in self._servers.values():
            server.store.close()

    def _ask(self, key: bytes, default: T, what: Callable[[Store], T]) -> T:
        server = self._servers[self._ring.server(key)]
        if server.down:
            self._count("skipped")
            return default
        return self._attempt(server, default, what)

    def _attempt(self, server: _Server, default: T, what: Callable[[Store], T]) -> T:
        try:
            return what(server.store)
        except OSError as error:
            server.down_until = time.monotonic() + self._backoff
            server.error = str(error)
            self._count("failures")
            return default

    def _count(self, what: str, number: int = 1) -> None:
        with self._lock:
            self._counts[what] += number
