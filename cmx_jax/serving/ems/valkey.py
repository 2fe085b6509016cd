"""Blocks on a Redis or Valkey server, as a `Store`: values under `cmx:namespace:key`.

Memory, eviction and persistence are the server's, by its own configuration (`maxmemory`, `maxmemory-policy`);
there are no quotas.
"""

import contextlib
from collections import Counter
from collections.abc import Iterator
from typing import Any

from cmx_jax.errors import CmxError
from cmx_jax.serving.ems.block import opened, sealed
from cmx_jax.serving.ems.store import Hit, named

COUNTS = ("misses", "bad", "puts", "duplicates", "refused")


class ValkeyStore:
    """A client of one server.

    Args:
      url: `valkey://[[user]:password@]host[:port][/database]`, `redis://...`, or `unix://` and a path.
      timeout: seconds for connecting, and for each answer.

    Raises:
      CmxError: the client is not installed, or the URL is none. Of methods: the namespace or key cannot be
        one, `OSError`: the server cannot be reached in time, or answers with an error.
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
        """A block, None if there is none; a damaged one is removed."""
        name = _name(namespace, key)
        with self._reached():
            block = self._client.get(name)
            payload = None if block is None else opened(key, block)
            if payload is not None:
                self._counts["hits"] += 1
                return Hit(payload, "valkey")
            if block is not None:
                self._counts["bad"] += 1
                self._client.delete(name)
        self._counts["misses"] += 1
        return None

    def put(self, namespace: str, key: bytes, payload: bytes) -> bool:
        """Whether the block is there now; False if the server has no memory for it."""
        name = _name(namespace, key)
        with self._reached():
            try:
                new = self._client.set(name, sealed(key, payload), nx=True)
            except self._errors.OutOfMemoryError:
                self._counts["refused"] += 1
                return False
        self._counts["puts" if new else "duplicates"] += 1
        return True

    def exists(self, namespace: str, key: bytes) -> bool:
        """Whether a block is there."""
        with self._reached():
            return self._client.exists(_name(namespace, key)) == 1

    def delete(self, namespace: str, key: bytes) -> bool:
        """Removes a block; whether there was one."""
        with self._reached():
            return self._client.delete(_name(namespace, key)) == 1

    def stats(self) -> dict[str, Any]:
        """This client's counters, and the bytes and values that the server holds of everybody."""
        with self._reached():
            held = {"bytes": self._client.info("memory")["used_memory"], "blocks": self._client.dbsize()}
        counts = {what: self._counts[what] for what in COUNTS}
        return {"hits": {"valkey": self._counts["hits"]}, **counts, "valkey": held}

    def close(self) -> None:
        """Closes the connections."""
        self._client.close()

    @contextlib.contextmanager
    def _reached(self) -> Iterator[None]:
        try:
            yield
        except self._errors.ValkeyError as error:
            raise ConnectionError(f"Valkey: {error}") from None


def _name(namespace: str, key: bytes) -> str:
    named(namespace, key)
    return f"cmx:{namespace}:{key.hex()}"
