"""The process around the app: one socket, signals, and a shutdown in which no request is lost silently.

On SIGTERM or SIGINT, `/health` answers 503, new requests are refused, and running ones have some time to
finish. Requests that still run after that end with an error, and the socket closes. A second signal ends the
wait.
"""

import asyncio
import contextlib
import logging
import socket
from collections.abc import Callable
from types import FrameType

import uvicorn
from fastapi import FastAPI

from cmx_jax.errors import CmxError
from cmx_jax.serving.service.frontend import Frontend

LAST_WORDS_S = 5  # in which clients can read answers that are ready


def bind(host: str, port: int) -> socket.socket:
    """Returns a listening socket; port 0 takes a free port.

    Raises:
      CmxError: The address or port is invalid, or in use.
    """
    if not 0 <= port < 2**16:
        raise CmxError(f"port is {port}, expected 0 (any free one) to 65535")
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        sock = socket.socket(family, kind, protocol)
    except (OSError, UnicodeError):
        raise CmxError(
            f"host {host!r} is not an address of this machine, expected one such as 127.0.0.1"
        ) from None
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        sock.bind(address)
        sock.listen(2048)
    except OSError as error:
        sock.close()
        raise CmxError(
            f"{host}:{port} cannot be bound ({error.strerror}): choose another --port or --host"
        ) from None
    sock.setblocking(False)
    return sock


def url(sock: socket.socket) -> str:
    """Returns the URL of a listening socket."""
    host, port = sock.getsockname()[:2]
    return f"http://{f'[{host}]' if ':' in host else host}:{port}"


class Server(uvicorn.Server):
    """Serves an app until a signal or `stop`.

    Args:
      app: App that answers requests.
      service: Service of the app, which is drained before the server ends.
      shutdown_timeout_s: Seconds that running requests have to finish.
    """

    def __init__(self, app: FastAPI, service: Frontend, shutdown_timeout_s: float):
        config = uvicorn.Config(
            app,
            log_level="warning",
            access_log=False,
            server_header=False,
            timeout_graceful_shutdown=LAST_WORDS_S,
        )
        super().__init__(config)
        self._service, self._timeout_s = service, shutdown_timeout_s
        self._draining: asyncio.Task[None] | None = None

    def run_on(self, sock: socket.socket, ready: Callable[[], None]) -> None:
        """Serves until a signal or `stop`; calls `ready` as soon as the server answers."""
        # no warnings about data sent to clients that left
        logging.getLogger("asyncio").setLevel(logging.ERROR)
        asyncio.run(self._run_on(sock, ready))

    async def _run_on(self, sock: socket.socket, ready: Callable[[], None]) -> None:
        self._loop, self._ready = asyncio.get_running_loop(), ready
        await self.serve([sock])

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Starts up, then calls `ready`."""
        await super().startup(sockets)
        self._ready()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Begins to stop at the first signal; stops waiting at the second."""
        with contextlib.suppress(RuntimeError):  # the loop is closed already
            self._loop.call_soon_threadsafe(self.stop)

    def stop(self) -> None:
        """Begins to stop at the first call; stops waiting at the second. To be called on the event loop."""
        if self._draining is None:
            self._draining = self._loop.create_task(self._drain())
        else:
            self._draining.cancel()

    async def _drain(self) -> None:
        try:
            await self._service.drain(self._timeout_s)
        finally:
            self.should_exit = True
