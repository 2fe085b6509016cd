"""Blocks in a Mooncake store, as a `Store`, over TCP: values under `cmx:namespace:key`.

This process lends the store a segment of its memory, as each of its clients does; where blocks lie and which
of them leave is the master's to say.
"""

import socket
from collections import Counter
from typing import Any

from cmx_jax.errors import CmxError
from cmx_jax.serving.ems.block import opened, sealed
from cmx_jax.serving.ems.store import Hit, named

NO_ROOM, UNREACHABLE = -600, -900  # of the client's return codes
COUNTS = ("misses", "bad", "puts", "refused")


class MooncakeStore:
    """A client of one master.

    Args:
      master: its `host:port`.
      host: where the other clients find this one.
      metadata: the metadata server's URL; by default clients tell each other.
      segment: bytes of memory that are lent.
      buffer: bytes of the buffer that blocks go through; larger ones are refused.
      timeout: seconds in which the master accepts a connection when the client starts.

    Raises:
      CmxError: the package is not installed, or the address is none. Of methods: the namespace or key cannot
        be one. `OSError`, here and of methods: the master cannot be reached, or the client reports an error.
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
        # the client itself tries for minutes
        socket.create_connection((name, int(port)), timeout).close()
        self._client = MooncakeDistributedStore()
        self._checked(self._client.setup(host, metadata, segment, buffer, "tcp", "", master))

    def get(self, namespace: str, key: bytes) -> Hit | None:
        """A block, None if there is none; a damaged one is removed."""
        name = _name(namespace, key)
        block = self._client.get(name)
        payload = opened(key, block)
        if payload is not None:
            self._counts["hits"] += 1
            return Hit(payload, "mooncake")
        # nothing comes of what is not there, and of a master that is gone
        if self._checked(self._client.is_exist(name)) and block:
            self._counts["bad"] += 1
            self._client.remove(name, True)
        self._counts["misses"] += 1
        return None

    def put(self, namespace: str, key: bytes, payload: bytes) -> bool:
        """Whether the block is there now; False if there is no room for it."""
        code = self._client.put(_name(namespace, key), sealed(key, payload))
        if code == NO_ROOM:
            self._counts["refused"] += 1
            return False
        self._checked(code)
        self._counts["puts"] += 1
        return True

    def exists(self, namespace: str, key: bytes) -> bool:
        """Whether a block is there."""
        return self._checked(self._client.is_exist(_name(namespace, key))) == 1

    def delete(self, namespace: str, key: bytes) -> bool:
        """Removes a block; whether there was one."""
        there = self.exists(namespace, key)
        if there:
            self._checked(self._client.remove(_name(namespace, key), True))
        return there

    def stats(self) -> dict[str, Any]:
        """This client's counters."""
        counts = {what: self._counts[what] for what in COUNTS}
        return {"hits": {"mooncake": self._counts["hits"]}, **counts}

    def close(self) -> None:
        """Takes the segment back, and what lies in it."""
        self._client.close()

    def _checked(self, code: int) -> int:
        if code < 0:
            what = "the master cannot be reached" if code == UNREACHABLE else "the client reports an error"
            raise ConnectionError(f"Mooncake: {what} ({code})")
        return code


def _name(namespace: str, key: bytes) -> str:
    named(namespace, key)
    return f"cmx:{namespace}:{key.hex()}"
