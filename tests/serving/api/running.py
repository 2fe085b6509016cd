"""Servers for tests: the real app over the real engine, on a free port, on a thread."""

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import httpx
import openai

from cmx_jax.serving.api.app import make_app
from cmx_jax.serving.api.served import Limits, Served
from cmx_jax.serving.api.template import ChatTemplate
from cmx_jax.serving.deploy.deployment import Deployment
from cmx_jax.serving.http.server import Server, bind, url
from cmx_jax.serving.service.service import Service


@dataclass
class Running:
    """A server that answers."""

    url: str
    served: Served
    http: httpx.Client

    @property
    def openai(self) -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0, timeout=120)

    def idle(self) -> bool:
        """Whether nothing is left in the engine; what is cancelled may take a step to go."""
        engine, until = self.served.deployment.engine, time.monotonic() + 20
        while time.monotonic() < until:
            if not (
                self.served.service.live
                or engine.waiting
                or any(i.allocator.places for i in engine.instances)
            ):
                return True
            time.sleep(0.02)
        return False


@contextmanager
def serving(deployment: Deployment, limits: Limits | None = None, **keys: list[str]) -> Iterator[Running]:
    """Serves a deployment on a thread until the block ends."""
    served = Served(
        name="tiny",
        deployment=deployment,
        service=Service(deployment.engine),
        template=ChatTemplate.read(deployment.model.directory),
        limits=limits or Limits(),
    )
    server, ready = Server(make_app(served, **keys), served.service, shutdown_timeout_s=5), threading.Event()
    with bind("127.0.0.1", 0) as sock:
        thread = threading.Thread(target=server.run_on, args=(sock, ready.set), daemon=True)
        thread.start()
        assert ready.wait(30)
        with httpx.Client(base_url=url(sock), timeout=120) as http:
            yield Running(url(sock), served, http)
        server._loop.call_soon_threadsafe(server.stop)
        thread.join(30)
        assert not thread.is_alive()
