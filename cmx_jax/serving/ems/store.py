"""The interface of the caching pool's backends, and the format of a block in memory, on disk and on the wire.

| bytes | content |
|---|---|
| 4 | `CMXB` |
| 2 | version, little-endian like all numbers |
| 8 | length of the payload |
| 32 | key |
| 32 | sha256 of everything before it and of the payload |
| | payload |

A block contains its key so that a block stored in the wrong place is not taken for the one that belongs
there.
"""

import hashlib
import re
import struct
from typing import NamedTuple, Protocol, Required, TypedDict, runtime_checkable

from cmx_jax.errors import CmxError

KEY_BYTES = 32
NAMESPACE = re.compile(r"[a-z0-9][a-z0-9._-]{0,63}")
MAGIC, VERSION = b"CMXB", 1
_HEAD = struct.Struct("<4sHQ32s")
OVERHEAD = _HEAD.size + hashlib.sha256().digest_size

Name = tuple[str, bytes]  # namespace, key


class Hit(NamedTuple):
    """A block that was found in a store.

    Attributes:
      payload: Bytes of the block, verified.
      tier: Tier that held the block: `dram`, `disk`, or the backend's name.
    """

    payload: bytes
    tier: str


class TierStats(TypedDict, total=False):
    """Content of one tier of a store.

    Attributes:
      bytes: Number of bytes in the tier.
      blocks: Number of blocks in the tier.
      segment: Name of the shared memory segment (DRAM only).
      error: Last error of the file system, or "" (disk only).
    """

    bytes: Required[int]
    blocks: Required[int]
    segment: str
    error: str


class NamespaceStats(TypedDict):
    """Content of one namespace of a store.

    Attributes:
      bytes: Number of bytes on disk.
      blocks: Number of blocks on disk.
      quota: Largest number of bytes that the namespace may have, or None.
    """

    bytes: int
    blocks: int
    quota: int | None


class StoreStats(TypedDict, total=False):
    """Statistics of a store since its start, as JSON; each backend has some of these fields.

    Attributes:
      hits: Number of blocks read, by tier.
      misses: Number of blocks that were not found.
      bad: Number of damaged blocks.
      puts: Number of blocks stored.
      duplicates: Number of puts of blocks that were stored already.
      refused: Number of puts that the store did not accept.
      deleted: Number of deleted blocks.
      evictions: Number of evicted blocks, by reason.
      dram: Content of the DRAM tier.
      disk: Content of the disk tier.
      namespaces: Content of each namespace.
      valkey: Content of the Valkey server, of all its clients.
      damaged_on_wire: Number of blocks that a `RemoteStore` received damaged.
      error: Reason why the pool has no statistics of the store; no other field is present then.
    """

    hits: dict[str, int]
    misses: int
    bad: int
    puts: int
    duplicates: int
    refused: int
    deleted: int
    evictions: dict[str, int]
    dram: TierStats
    disk: TierStats
    namespaces: dict[str, NamespaceStats]
    valkey: TierStats
    damaged_on_wire: int
    error: str


@runtime_checkable
class Store(Protocol):
    """Blocks by namespace and key. Implementations may be called from several threads.

    Every method but `close` raises `CmxError` for an invalid namespace or key, and `OSError` if the store
    cannot be reached: the pool counts that, and continues without the store.
    """

    def get(self, namespace: str, key: bytes) -> Hit | None:
        """Returns the block, or None if it is not there or damaged."""

    def put(self, namespace: str, key: bytes, payload: bytes) -> bool:
        """Stores a block, unless it is stored already. Returns whether it is stored now."""

    def exists(self, namespace: str, key: bytes) -> bool:
        """Returns whether the block is stored."""

    def delete(self, namespace: str, key: bytes) -> bool:
        """Removes a block. Returns whether it was stored."""

    def stats(self) -> StoreStats:
        """Returns counters, and the present content."""

    def close(self) -> None:
        """Releases the store's resources."""


def block_name(namespace: str, key: bytes) -> Name:
    """Returns the name of a block, after checking its parts.

    Raises:
      CmxError: The namespace could not be a folder's name on every file system, or the key is not 32 bytes
        long.
    """
    if not NAMESPACE.fullmatch(namespace):
        raise CmxError(
            f"namespace {namespace[:80]!r}, expected 1 to 64 of a-z 0-9 . _ - with a letter or digit first"
        )
    if len(key) != KEY_BYTES:
        raise CmxError(f"key of {len(key)} bytes, expected {KEY_BYTES}, as keys.chain makes them")
    return namespace, key


def seal(key: bytes, payload: bytes) -> bytes:
    """Returns the block of a payload, which is `OVERHEAD` bytes longer."""
    head = _HEAD.pack(MAGIC, VERSION, len(payload), key)
    return b"".join((head, _digest(head, payload), payload))


def unseal(key: bytes, data: bytes) -> bytes | None:
    """Returns the payload of a block, or None if its length, version, key or checksum is wrong."""
    payload = memoryview(data)[OVERHEAD:]
    head = _HEAD.pack(MAGIC, VERSION, len(payload), key)
    intact = data[:OVERHEAD] == head + _digest(head, payload)
    return bytes(payload) if intact else None


def _digest(head: bytes, payload: bytes | memoryview) -> bytes:
    digest = hashlib.sha256(head)
    digest.update(payload)
    return digest.digest()
