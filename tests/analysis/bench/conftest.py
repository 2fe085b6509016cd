"""A real server for the load generator, and a scripted one."""

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from serving.api.running import Running, start_server

from cmx_jax.serving.deploy.deployment import Deployment, colocated, warm_up


@pytest.fixture(autouse=True)
def _no_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("CMX_API_KEY", "OPENAI_API_KEY"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture(scope="session")
def deployment() -> Deployment:
    deployment = colocated("tiny")
    warm_up(deployment.engine)
    return deployment


@pytest.fixture(scope="module")
def server(deployment: Deployment) -> Iterator[Running]:
    with start_server(deployment) as running:
        yield running


class Scripted(ThreadingHTTPServer):
    """Answers each POST with `status` and `answer`, after `hold` is set; lists `models`."""

    daemon_threads = True
    status, answer, missing = 200, b"", 0
    models: object = {"data": [{"id": "m"}]}

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.hold = threading.Event()
        self.hold.set()
        self.bodies: list[dict] = []
        self.url = f"http://127.0.0.1:{self.server_address[1]}"


class Handler(BaseHTTPRequestHandler):
    server: Scripted

    def do_GET(self) -> None:
        self._send(200, json.dumps(self.server.models).encode())

    def do_POST(self) -> None:
        self.server.bodies.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
        self.server.hold.wait(10)
        self._send(self.server.status, self.server.answer, self.server.missing)

    def _send(self, status: int, body: bytes, missing: int = 0) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(body) + missing))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def scripted() -> Iterator[Scripted]:
    with Scripted() as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.02,))
        thread.start()
        yield server
        server.hold.set()
        server.shutdown()
        thread.join()
