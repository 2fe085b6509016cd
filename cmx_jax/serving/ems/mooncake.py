"""Blocks in a Mooncake store, as a `Store`, over TCP: values under `cmx:namespace:key`.

This process lends the store a segment of its memory, as each of its clients does. The master decides where
blocks are stored, and which of them are evicted.
"""

import socket
from collections import Counter

from cmx_jax.errors import CmxError
from cmx_jax.serving.ems.store import Hit, StoreStats, block_name, seal, unseal

NO_ROOM, UNREACHABLE = -600, -900  # return codes of the client


class MooncakeStore:
    """A client of one master.

    Args:
      master: Address of the master, `host:port`.
      host: Address under which the other clients reach this one.
      metadata: URL of the metadata server; by default clients exchange metadata directly.
      segment: Size in bytes of the memory that is lent to the store.
      buffer: Size in bytes of the transfer buffer; larger blocks are refused.
      timeout: Seconds in which the master must accept a connection when the client starts.

    Raises:
      CmxError: The package is not installed, or the address is invalid. Methods raise it for an invalid
        namespace or key.
      OSError: The master cannot be reached, or the client reports an error; also raised by methods.
    """

    def __init__(
        self,
        master: str,
        *,
        host: str = "127.0.0.1",
        metadata: str = "P2PHANDSHAKE",
        segment: int = 256 << 20,
        buffer: int = 64 << 20,
        timeout: float = 5.0,
    ):
        try:
            from mooncake.store import MooncakeDistributedStore
        except ImportError as error:
            raise CmxError(
                f"blocks in Mooncake need its client ({error}): pip install 'cmx_jax[mooncake]', "
                "on Debian also libibverbs1 libnl-3-200 libnl-route-3-200"
            ) from None
        name, _, port = master.rpartition(":")
        if not name or not port.isdecimal():
            raise CmxError(f"Mooncake master {master[:80]!r}, expected HOST:PORT")
        self._counts: Counter[str] = Counter()
        # the client itself would try for minutes
        socket.create_connection((name, int(port)), timeout).close()
        self._client = MooncakeDistributedStore()
        self._check(self._client.setup(host, metadata, segment, buffer, "tcp", "", master))

    def get(self, namespace: str, key: bytes) -> Hit | None:
        """Returns a block, or None if there is none; a damaged block is removed."""
        name = _name(namespace, key)
        block = self._client.get(name)
        payload = unseal(key, block)
        if payload is not None:
            self._counts["hits"] += 1
            return Hit(payload, "mooncake")
        # the client returns b"" both for a missing block and for a master that is gone
        if self._check(self._client.is_exist(name)) and block:
            self._counts["bad"] += 1
            self._client.remove(name, True)
        self._counts["misses"] += 1
        return None

    def put(self, namespace: str, key: bytes, payload: bytes) -> bool:
        """Stores a block. Returns whether it is stored now; False if there is no room for it."""
        code = self._client.put(_name(namespace, key), seal(key, payload))
        if code == NO_ROOM:
            self._counts["refused"] += 1
            return False
        self._check(code)
        self._counts["puts"] += 1
        return True

    def exists(self, namespace: str, key: bytes) -> bool:
        """Returns whether a block is stored."""
        return self._check(self._client.is_exist(_name(namespace, key))) == 1

    def delete(self, namespace: str, key: bytes) -> bool:
        """Removes a block. Returns whether it was stored."""
        stored = self.exists(namespace, key)
        if stored:
            self._check(self._client.remove(_name(namespace, key), True))
        return stored

    def stats(self) -> StoreStats:
        """Returns the counters of this client."""
        return {
            "hits": {"mooncake": self._counts["hits"]},
            "misses": self._counts["misses"],
            "bad": self._counts["bad"],
            "puts": self._counts["puts"],
            "refused": self._counts["refused"],
        }

    def close(self) -> None:
        """Takes the segment back, with the blocks in it."""
        self._client.close()

    def _check(self, code: int) -> int:
        if code < 0:
            problem = "the master cannot be reached" if code == UNREACHABLE else "the client reports an error"
            raise ConnectionError(f"Mooncake: {problem} ({code})")
        return code


def _name(namespace: str, key: bytes) -> str:
    block_name(namespace, key)
    return f"cmx:{namespace}:{key.hex()}"
