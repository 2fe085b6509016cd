"""A cache server as a process of its own: any `Store` over TCP."""

import contextlib
import socket
import socketserver
import sys
import threading
from typing import Any

from cmx_jax.errors import CmxError
from cmx_jax.serving.ems import frames
from cmx_jax.serving.ems.block import opened, sealed
from cmx_jax.serving.ems.store import Store

CONNECTIONS = 256


class CacheServer(socketserver.ThreadingTCPServer):
    """Answers for a store, each connection in a thread of its own, until `stop`.

    Attributes:
      port: where it listens.
    """

    allow_reuse_address = True
    request_queue_size = 64

    def __init__(
        self, store: Store, host: str, port: int, secret: bytes, timeout: float, idle: float, body_limit: int
    ):
        self.store, self.secret = store, secret
        self.operation_timeout, self.idle_timeout, self.body_limit = timeout, idle, body_limit
        self._connections: set[socket.socket] = set()
        self._lock = threading.Lock()
        super().__init__((host, port), _Connection)
        self.port: int = self.server_address[1]
        self._thread = threading.Thread(target=self.serve_forever, args=(0.1,), name="ems-serve", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Takes no more connections, answers what was asked, and ends; the store stays open."""
        self.shutdown()
        self._thread.join()
        with self._lock:
            for connection in self._connections:
                with contextlib.suppress(OSError):  # it ended by itself
                    connection.shutdown(socket.SHUT_RD)
        self.server_close()  # waits for the connections' threads, none of which waits without a limit

    def verify_request(self, request: Any, client_address: Any) -> bool:
        """Whether there is a place for one more connection."""
        with self._lock:
            if len(self._connections) >= CONNECTIONS:
                return False
            self._connections.add(request)
            return True

    def shutdown_request(self, request: Any) -> None:
        """Closes a connection."""
        with self._lock:
            self._connections.discard(request)
            super().shutdown_request(request)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that left, or that is not one, is no error of this process."""
        if not isinstance(sys.exc_info()[1], (OSError, EOFError)):
            super().handle_error(request, client_address)


def serve(
    store: Store,
    *,
    secret: str,
    host: str = "127.0.0.1",
    port: int = 0,
    timeout: float = 10.0,
    idle: float = 60.0,
    body_limit: int = frames.BODY_LIMIT,
) -> CacheServer:
    """Starts a server of a store; clients are `RemoteStore`s with the same secret.

    Args:
      port: 0 takes a free one.
      timeout: seconds in which a client takes an answer, or proves that it knows the secret.
      idle: seconds in which a client's next request has come as a whole; its connection is closed after that.
      body_limit: bytes of the largest frame that is read.

    Raises:
      CmxError: there is no secret, or the address cannot be listened on.
    """
    if not secret:
        raise CmxError("a cache server needs a secret that its clients share")
    try:
        return CacheServer(store, host, port, secret.encode(), timeout, idle, body_limit)
    except (OSError, OverflowError) as error:
        raise CmxError(f"{host}:{port} cannot be listened on ({error})") from None


class _Connection(socketserver.BaseRequestHandler):
    server: CacheServer

    def handle(self) -> None:
        try:
            server = self.server
            if frames.accept(self.request, server.secret, server.operation_timeout):
                while True:
                    self._answer(*frames.receive(self.request, server.idle_timeout, server.body_limit))
        except frames.FrameError as error:
            self._send({"error": str(error)})

    def _answer(self, meta: dict[str, Any], body: bytes) -> None:
        try:
            self._send(*_done(self.server.store, meta, body))
        except (CmxError, KeyError, TypeError, ValueError) as error:
            self._send({"error": str(error)})

    def _send(self, meta: dict[str, Any], body: bytes = b"") -> None:
        frames.send(self.request, meta, body, self.server.operation_timeout)


def _done(store: Store, meta: dict[str, Any], body: bytes) -> tuple[dict[str, Any], bytes]:
    """Does what a frame asks for; the answer."""
    if meta["op"] == "stats":
        return {"stats": store.stats()}, b""
    namespace, key = meta["namespace"], bytes.fromhex(meta["key"])
    match meta["op"]:
        case "get":
            hit = store.get(namespace, key)
            return ({"tier": hit.tier}, sealed(key, hit.payload)) if hit else ({"tier": None}, b"")
        case "put":
            payload = opened(key, body)
            return {"done": payload is not None and store.put(namespace, key, payload)}, b""
        case "exists":
            return {"done": store.exists(namespace, key)}, b""
        case "delete":
            return {"done": store.delete(namespace, key)}, b""
    raise CmxError(f"operation {meta['op']!r} is not known")
