"""What cache servers and their clients send: frames of a header, JSON that says what is meant, and raw bytes.

| bytes | what |
|---|---|
| 4 | `CMX1` |
| 4 | length of the JSON object, little-endian as all numbers |
| 8 | length of the bytes behind it |

A connection begins with two challenges: each side sends a nonce and answers the other's with an HMAC-SHA256
under the shared secret, which itself never travels. What follows is neither encrypted nor signed: this is for
networks whose wires are trusted.
"""

import hashlib
import hmac
import json
import secrets
import socket
import struct
import time
from typing import Any

MAGIC = b"CMX1"
META_LIMIT = 1 << 20
BODY_LIMIT = 64 << 20
_HEAD = struct.Struct("<4sIQ")


class FrameError(ConnectionError):
    """What came is not a frame of this protocol, or larger than allowed."""


def send(sock: socket.socket, meta: dict[str, Any], body: bytes, timeout: float) -> None:
    """Sends a frame within `timeout` seconds.

    Raises:
      OSError: the other side is gone, or too slow.
    """
    text = json.dumps(meta).encode()
    sock.settimeout(timeout)
    sock.sendall(b"".join((_HEAD.pack(MAGIC, len(text), len(body)), text, body)))


def receive(sock: socket.socket, timeout: float, body_limit: int) -> tuple[dict[str, Any], bytes]:
    """A frame that is whole within `timeout` seconds.

    Raises:
      EOFError: the other side closed the connection before its first byte.
      OSError: it is gone, or too slow; `FrameError`: it does not speak this protocol.
    """
    deadline = time.monotonic() + timeout
    magic, meta_size, body_size = _HEAD.unpack(_exactly(sock, _HEAD.size, deadline))
    if magic != MAGIC:
        raise FrameError(f"a frame begins with {magic!r}, expected {MAGIC!r}")
    if meta_size > META_LIMIT or body_size > body_limit:
        raise FrameError(
            f"a frame of {meta_size} and {body_size} bytes, at most {META_LIMIT} and {body_limit}"
        )
    try:
        meta = json.loads(_exactly(sock, meta_size, deadline))
    except (ValueError, RecursionError):
        raise FrameError("a frame's head is no JSON") from None
    if not isinstance(meta, dict):
        raise FrameError("a frame's head is no JSON object")
    return meta, _exactly(sock, body_size, deadline)


def knows(secret: bytes, role: str, nonce: str, answer: object) -> bool:
    """Whether a challenge was answered by who knows the secret, in its role (`client` or `server`)."""
    expected = proof(secret, role, nonce)
    return isinstance(answer, str) and answer.isascii() and hmac.compare_digest(answer, expected)


def proof(secret: bytes, role: str, nonce: str) -> str:
    """The answer to a challenge."""
    return hmac.new(secret, f"{role} {nonce}".encode(errors="replace"), hashlib.sha256).hexdigest()


def accept(sock: socket.socket, secret: bytes, timeout: float) -> bool:
    """The challenges, by the side that was connected to; whether the other one knows the secret.

    Raises:
      EOFError, OSError: as `receive`.
    """
    nonce = secrets.token_hex(32)
    send(sock, {"nonce": nonce}, b"", timeout)
    meta, _ = receive(sock, timeout, 0)
    trusted = knows(secret, "client", nonce, meta.get("answer"))
    send(sock, {"answer": proof(secret, "server", str(meta.get("nonce"))) if trusted else None}, b"", timeout)
    return trusted


def join(sock: socket.socket, secret: bytes, timeout: float) -> bool:
    """The challenges, by the side that connected; whether the other one knows the secret.

    Raises:
      EOFError, OSError: as `receive`.
    """
    challenge, _ = receive(sock, timeout, 0)
    nonce = secrets.token_hex(32)
    send(
        sock,
        {"answer": proof(secret, "client", str(challenge.get("nonce"))), "nonce": nonce},
        b"",
        timeout,
    )
    return knows(secret, "server", nonce, receive(sock, timeout, 0)[0].get("answer"))


def _exactly(sock: socket.socket, size: int, deadline: float) -> bytes:
    parts, missing = [], size
    while missing:
        left = deadline - time.monotonic()
        if left <= 0:
            raise TimeoutError("a frame did not arrive in time")
        sock.settimeout(left)
        part = sock.recv(min(missing, 1 << 20))
        if not part:
            raise (
                EOFError("the connection was closed") if missing == size else FrameError("a frame ends early")
            )
        parts.append(part)
        missing -= len(part)
    return b"".join(parts)
