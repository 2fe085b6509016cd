"""How a block lies in memory, on disk and on the wire: a header that says what it is, then its bytes.

| bytes | what |
|---|---|
| 4 | `CMXB` |
| 2 | version, little-endian as all numbers |
| 8 | length of the payload |
| 32 | key |
| 32 | sha256 of all that is before it and of the payload |
| | payload |

The key is in the block so that one that lies where another belongs is not taken for it.
"""

import hashlib
import struct

MAGIC, VERSION = b"CMXB", 1
_HEAD = struct.Struct("<4sHQ32s")
OVERHEAD = _HEAD.size + hashlib.sha256().digest_size


def sealed(key: bytes, payload: bytes) -> bytes:
    """The block of a payload: `OVERHEAD` bytes more."""
    head = _HEAD.pack(MAGIC, VERSION, len(payload), key)
    return b"".join((head, _digest(head, payload), payload))


def opened(key: bytes, data: bytes) -> bytes | None:
    """The payload; None if anything is wrong: short, long, of another version or key, changed."""
    payload = memoryview(data)[OVERHEAD:]
    head = _HEAD.pack(MAGIC, VERSION, len(payload), key)
    intact = data[:OVERHEAD] == head + _digest(head, payload)
    return bytes(payload) if intact else None


def _digest(head: bytes, payload: bytes | memoryview) -> bytes:
    digest = hashlib.sha256(head)
    digest.update(payload)
    return digest.digest()
