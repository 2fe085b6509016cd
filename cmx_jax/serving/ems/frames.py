"""Frames between cache servers and their clients: a header, a JSON object, and raw bytes.

| bytes | content |
|---|---|
| 4 | `CMX1` |
| 4 | length of the JSON object, little-endian like all numbers |
| 8 | length of the bytes after the JSON object |

A connection begins with two challenges: each side sends a nonce and answers the other's with an HMAC-SHA256
under the shared secret, which itself is never sent. The frames after that are neither encrypted nor signed:
the protocol is for trusted networks.
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

Meta = dict[str, Any]
"""JSON object of a frame: an operation and its arguments, or its results."""


class FrameError(ConnectionError):
    """The received bytes are not a frame of this protocol, or the frame is larger than allowed."""


def send(sock: socket.socket, meta: Meta, body: bytes, timeout: float) -> None:
    """Sends a frame within `timeout` seconds.

    Raises:
      OSError: The other side is gone, or too slow.
    """
    text = json.dumps(meta).encode()
    sock.settimeout(timeout)
    sock.sendall(b"".join((_HEAD.pack(MAGIC, len(text), len(body)), text, body)))


def receive(sock: socket.socket, timeout: float, body_limit: int) -> tuple[Meta, bytes]:
    """Receives a whole frame within `timeout` seconds.

    Raises:
      EOFError: The other side closed the connection before the frame's first byte.
      FrameError: The other side does not speak this protocol, or the frame is too large.
      OSError: The other side is gone, or too slow.
    """
    deadline = time.monotonic() + timeout
    magic, meta_size, body_size = _HEAD.unpack(_receive_exactly(sock, _HEAD.size, deadline))
    if magic != MAGIC:
        raise FrameError(f"a frame begins with {magic!r}, expected {MAGIC!r}")
    if meta_size > META_LIMIT or body_size > body_limit:
        raise FrameError(
            f"a frame of {meta_size} and {body_size} bytes, at most {META_LIMIT} and {body_limit}"
        )
    try:
        meta = json.loads(_receive_exactly(sock, meta_size, deadline))
    except (ValueError, RecursionError):
        raise FrameError("a frame's head is not JSON") from None
    if not isinstance(meta, dict):
        raise FrameError("a frame's head is not a JSON object")
    return meta, _receive_exactly(sock, body_size, deadline)


def knows(secret: bytes, role: str, nonce: str, answer: object) -> bool:
    """Returns whether `answer` proves that its sender knows the secret.

    Args:
      secret: Shared secret.
      role: Role of the sender, `client` or `server`.
      nonce: Challenge that was sent.
      answer: Answer that was received.
    """
    expected = proof(secret, role, nonce)
    return isinstance(answer, str) and answer.isascii() and hmac.compare_digest(answer, expected)


def proof(secret: bytes, role: str, nonce: str) -> str:
    """Returns the answer to a challenge."""
    return hmac.new(secret, f"{role} {nonce}".encode(errors="replace"), hashlib.sha256).hexdigest()


def accept(sock: socket.socket, secret: bytes, timeout: float) -> bool:
    """Exchanges challenges, as the server. Returns whether the client knows the secret.

    Raises:
      EOFError, OSError: The connection failed, as in `receive`.
    """
    nonce = secrets.token_hex(32)
    send(sock, {"nonce": nonce}, b"", timeout)
    meta, _ = receive(sock, timeout, 0)
    trusted = knows(secret, "client", nonce, meta.get("answer"))
    send(sock, {"answer": proof(secret, "server", str(meta.get("nonce"))) if trusted else None}, b"", timeout)
    return trusted


def join(sock: socket.socket, secret: bytes, timeout: float) -> bool:
    """Exchanges challenges, as the client. Returns whether the server knows the secret.

    Raises:
      EOFError, OSError: The connection failed, as in `receive`.
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


def _receive_exactly(sock: socket.socket, size: int, deadline: float) -> bytes:
    parts, missing = [], size
    while missing:
        remaining = deadline - time.monotonic()
        if remaining <= 0:
            raise TimeoutError("a frame did not arrive in time")
        sock.settimeout(remaining)
        part = sock.recv(min(missing, 1 << 20))
        if not part:
            raise (
                EOFError("the connection was closed") if missing == size else FrameError("a frame ends early")
            )
        parts.append(part)
        missing -= len(part)
    return b"".join(parts)
