"""A cache server in another process, as a `Store` (`listener.py` is the server's end)."""

import contextlib
import socket
from collections.abc import Iterator

from cmx_jax.errors import CmxError
from cmx_jax.serving.ems import frames
from cmx_jax.serving.ems.store import OVERHEAD, Hit, StoreStats, block_name, seal, unseal


class RemoteStore:
    """A client of one cache server.

    * It connects at the first operation, so that it may be made before the server is up.
    * Blocks are sent sealed, so damage that TCP's checksum does not notice becomes a miss.
    * An idle connection may have been closed by the server: an operation that fails on one is tried once
      more, over a new connection. All operations may be repeated.

    Args:
      address: Address of the server, `host:port`.
      secret: Secret of the server.
      timeout: Seconds for connecting, and for each frame.
      body_limit: Size of the largest frame body in bytes.

    Raises:
      CmxError: The address is invalid. Methods raise it for an invalid namespace or key, and `OSError` if the
        server cannot be reached in time, has another secret (`PermissionError`) or answers with an error.
    """

    def __init__(
        self, address: str, *, secret: str, timeout: float = 5.0, body_limit: int = frames.BODY_LIMIT
    ):
        host, _, port = address.rpartition(":")
        try:
            host.encode("idna")
            valid = bool(host) and port.isdecimal() and 0 < int(port) < 65536
        except UnicodeError:
            valid = False
        if not valid:
            raise CmxError(f"cache server {address[:80]!r}, expected HOST:PORT")
        self._address, self._peer = address, (host.strip("[]"), int(port))
        self._secret, self._timeout, self._limit = secret.encode(), timeout, body_limit
        self._idle: list[socket.socket] = []
        self._bad = 0

    def get(self, namespace: str, key: bytes) -> Hit | None:
        """Returns a block, or None if there is none or it arrived damaged."""
        meta, body = self._call("get", namespace, key)
        if meta.get("tier") is None:
            return None
        payload = unseal(key, body)
        self._bad += payload is None
        return None if payload is None else Hit(payload, str(meta["tier"]))

    def put(self, namespace: str, key: bytes, payload: bytes) -> bool:
        """Stores a block. Returns whether it is stored now; refuses blocks above the frame limit."""
        if len(payload) + OVERHEAD > self._limit:
            return False
        return self._call("put", namespace, key, seal(key, payload))[0].get("done") is True

    def exists(self, namespace: str, key: bytes) -> bool:
        """Returns whether a block is stored."""
        return self._call("exists", namespace, key)[0].get("done") is True

    def delete(self, namespace: str, key: bytes) -> bool:
        """Removes a block. Returns whether it was stored."""
        return self._call("delete", namespace, key)[0].get("done") is True

    def stats(self) -> StoreStats:
        """Returns the server's statistics, and the number of blocks that arrived damaged."""
        stats: StoreStats = self._request({"op": "stats"}, b"")[0]["stats"]
        return {**stats, "damaged_on_wire": self._bad}

    def close(self) -> None:
        """Closes the connections that are open."""
        while self._idle:
            self._idle.pop().close()

    def _call(self, op: str, namespace: str, key: bytes, body: bytes = b"") -> tuple[frames.Meta, bytes]:
        block_name(namespace, key)
        return self._request({"op": op, "namespace": namespace, "key": key.hex()}, body)

    def _request(self, meta: frames.Meta, body: bytes) -> tuple[frames.Meta, bytes]:
        with contextlib.suppress(IndexError, EOFError, ConnectionError):
            return self._exchange(self._idle.pop(), meta, body)
        self.close()  # the other connections are as old
        try:
            return self._exchange(self._connect(), meta, body)
        except EOFError:
            raise ConnectionError(f"{self._address}: the cache server closed the connection") from None
        except OSError as error:
            raise type(error)(f"{self._address}: {error}") from None

    def _exchange(self, sock: socket.socket, meta: frames.Meta, body: bytes) -> tuple[frames.Meta, bytes]:
        with _closed_on_failure(sock):
            frames.send(sock, meta, body, self._timeout)
            answer = frames.receive(sock, self._timeout, self._limit)
            if "error" in answer[0]:
                raise frames.FrameError(f"the cache server says: {answer[0]['error']}")
        self._idle.append(sock)
        return answer

    def _connect(self) -> socket.socket:
        sock = socket.create_connection(self._peer, self._timeout)
        with _closed_on_failure(sock):
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            if not frames.join(sock, self._secret, self._timeout):
                raise PermissionError("the cache server does not share our secret")
        return sock


@contextlib.contextmanager
def _closed_on_failure(sock: socket.socket) -> Iterator[None]:
    try:
        yield
    except BaseException:
        sock.close()
        raise
