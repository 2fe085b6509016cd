"""Blocks on a Redis or Valkey server, as a `Store`: values under `cmx:namespace:key`.

The server's own configuration (`maxmemory`, `maxmemory-policy`) rules memory, eviction and persistence; there
are no quotas.
"""

import contextlib
from collections import Counter
from collections.abc import Iterator
from typing import Any

from cmx_jax.errors import CmxError
from cmx_jax.serving.ems.store import Hit, StoreStats, TierStats, block_name, seal, unseal


class ValkeyStore:
    """A client of one server.

    Args:
      url: URL of the server: `valkey://[[user]:password@]host[:port][/database]`, `redis://...`, or `unix://`
        and a path.
      timeout: Seconds for connecting, and for each answer.

    Raises:
      CmxError: The client is not installed, or the URL is invalid. Methods raise it for an invalid namespace
        or key, and `OSError` if the server cannot be reached in time or answers with an error.
    """

    def __init__(self, url: str, *, timeout: float = 5.0):
        try:
            import valkey
        except ImportError:
            raise CmxError("blocks on Valkey need its client: pip install 'cmx_jax[valkey]'") from None
        self._errors = valkey.exceptions
        self._counts: Counter[str] = Counter()
        try:
            self._client: Any = valkey.Valkey.from_url(
                url, socket_timeout=timeout, socket_connect_timeout=timeout
            )
        except ValueError as error:
            raise CmxError(f"{url[:80]}: not the URL of a Valkey server ({error})") from None

    def get(self, namespace: str, key: bytes) -> Hit | None:
        """Returns a block, or None if there is none; a damaged block is removed."""
        name = _name(namespace, key)
        with self._connection_errors():
            block = self._client.get(name)
            payload = None if block is None else unseal(key, block)
            if payload is not None:
                self._counts["hits"] += 1
                return Hit(payload, "valkey")
            if block is not None:
                self._counts["bad"] += 1
                self._client.delete(name)
        self._counts["misses"] += 1
        return None

    def put(self, namespace: str, key: bytes, payload: bytes) -> bool:
        """Stores a block. Returns whether it is stored now; False if the server has no memory for it."""
        name = _name(namespace, key)
        with self._connection_errors():
            try:
                new = self._client.set(name, seal(key, payload), nx=True)
            except self._errors.OutOfMemoryError:
                self._counts["refused"] += 1
                return False
        self._counts["puts" if new else "duplicates"] += 1
        return True

    def exists(self, namespace: str, key: bytes) -> bool:
        """Returns whether a block is stored."""
        with self._connection_errors():
            return self._client.exists(_name(namespace, key)) == 1

    def delete(self, namespace: str, key: bytes) -> bool:
        """Removes a block. Returns whether it was stored."""
        with self._connection_errors():
            return self._client.delete(_name(namespace, key)) == 1

    def stats(self) -> StoreStats:
        """Returns the counters of this client, and the bytes and values of all clients on the server."""
        with self._connection_errors():
            content: TierStats = {
                "bytes": self._client.info("memory")["used_memory"],
                "blocks": self._client.dbsize(),
            }
        return {
            "hits": {"valkey": self._counts["hits"]},
            "misses": self._counts["misses"],
            "bad": self._counts["bad"],
            "puts": self._counts["puts"],
            "duplicates": self._counts["duplicates"],
            "refused": self._counts["refused"],
            "valkey": content,
        }

    def close(self) -> None:
        """Closes the connections."""
        self._client.close()

    @contextlib.contextmanager
    def _connection_errors(self) -> Iterator[None]:
        try:
            yield
        except self._errors.ValkeyError as error:
            raise ConnectionError(f"Valkey: {error}") from None


def _name(namespace: str, key: bytes) -> str:
    block_name(namespace, key)
    return f"cmx:{namespace}:{key.hex()}"
