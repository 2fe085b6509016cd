"""A cache server: any `Store` over TCP."""

import contextlib
import socket
import socketserver
import sys
import threading
from typing import Any

from cmx_jax.errors import CmxError
from cmx_jax.serving.ems import frames
from cmx_jax.serving.ems.store import Store, seal, unseal

CONNECTIONS = 256


class CacheServer(socketserver.ThreadingTCPServer):
    """Answers requests for a store until `stop`; each connection has its own thread.

    Attributes:
      port: TCP port on which the server listens.
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
        """Accepts no more connections, answers the received requests, and ends. The store stays open."""
        self.shutdown()
        self._thread.join()
        with self._lock:
            for connection in self._connections:
                with contextlib.suppress(OSError):  # it was closed already
                    connection.shutdown(socket.SHUT_RD)
        self.server_close()  # waits for the connections' threads, each of which has time limits

    def verify_request(self, request: Any, client_address: Any) -> bool:
        """Returns whether one more connection is accepted, and counts it if so."""
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
        """Ignores errors of clients that disconnect or that do not speak the protocol."""
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
      store: Store to serve; the caller closes it.
      secret: Secret that the clients share.
      host: Address to listen on.
      port: TCP port; 0 takes a free one.
      timeout: Seconds in which a client must take an answer, or prove that it knows the secret.
      idle: Seconds in which a client's next request must be complete, else its connection is closed.
      body_limit: Size of the largest accepted frame body in bytes.

    Raises:
      CmxError: The secret is empty, or the address cannot be listened on.
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

    def _answer(self, meta: frames.Meta, body: bytes) -> None:
        try:
            self._send(*_run(self.server.store, meta, body))
        except (CmxError, KeyError, TypeError, ValueError) as error:
            self._send({"error": str(error)})

    def _send(self, meta: frames.Meta, body: bytes = b"") -> None:
        frames.send(self.request, meta, body, self.server.operation_timeout)


def _run(store: Store, meta: frames.Meta, body: bytes) -> tuple[frames.Meta, bytes]:
    """Runs the operation of a frame. Returns the frame that answers it."""
    if meta["op"] == "stats":
        return {"stats": store.stats()}, b""
    namespace, key = meta["namespace"], bytes.fromhex(meta["key"])
    match meta["op"]:
        case "get":
            hit = store.get(namespace, key)
            return ({"tier": hit.tier}, seal(key, hit.payload)) if hit else ({"tier": None}, b"")
        case "put":
            payload = unseal(key, body)
            return {"done": payload is not None and store.put(namespace, key, payload)}, b""
        case "exists":
            return {"done": store.exists(namespace, key)}, b""
        case "delete":
            return {"done": store.delete(namespace, key)}, b""
    raise CmxError(f"operation {meta['op']!r} is not known")
