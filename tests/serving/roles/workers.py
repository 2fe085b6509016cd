"""Workers of the small golden model on threads of this process: the real app, sockets and transfers, and an
engine that a test can reach into."""

import asyncio
import threading
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TypeVar

from serving.ems.stores import eventually

from cmx_jax.serving.deploy.deployment import Deployment
from cmx_jax.serving.deploy.model import Model
from cmx_jax.serving.deploy.site import NpuRange
from cmx_jax.serving.engine.engine import Engine
from cmx_jax.serving.executor.instance import Instance
from cmx_jax.serving.http.server import Server, bind, url
from cmx_jax.serving.kv import JaxTransport, LeasedPages
from cmx_jax.serving.roles.members import Members
from cmx_jax.serving.roles.router import Router
from cmx_jax.serving.roles.worker import Worker, make_worker
from cmx_jax.serving.scheduling.request import SamplingParams
from cmx_jax.serving.service.service import Service

T = TypeVar("T")
SECRET = "test"
CONTEXT = 128


@dataclass
class Running:
    """A worker that answers at `url`."""

    url: str
    worker: Worker
    server: Server

    @property
    def engine(self) -> Engine:
        return self.worker.service.engine

    def left(self) -> tuple[int, ...]:
        """Number of requests, tickets and pages left: all zeros when the worker is idle."""
        engine, service = self.engine, self.worker.service
        mover = engine.mover
        queues = (engine.waiting, engine.scheduler.transfers, mover.fetching, mover.tickets, service.live)
        loads = [len(i.allocator.places) + i.allocator.load for i in engine.instances]
        published = getattr(engine.outbox.transport, "_published", ())
        return (*map(len, queues), *loads, engine.outbox.waiting, len(published))

    def idle(self) -> None:
        eventually(lambda: not any(self.left()))


@contextmanager
def running(
    role: str, one: Instance, model: Model, *, secret: str = SECRET, lease_s: float = 30.0
) -> Iterator[Running]:
    """A worker with an instance, until the block ends."""
    deployment = Deployment(
        name=role,
        model=model,
        max_model_len=CONTEXT,
        npus={one.name: NpuRange(0, one.allocator.ranks)},
        engine=Engine([one], []),
    )
    deployment.engine = Engine(
        *(([one], []) if role == "prefill" else ([], [one])),
        outbox=LeasedPages(JaxTransport(), replace(deployment.fingerprint), lease_s),
    )
    service = Service(deployment.engine)
    worker = Worker(
        role=role, deployment=deployment, service=service, fingerprint=deployment.fingerprint, secret=secret
    )
    server, ready = Server(make_worker(worker), service, shutdown_timeout_s=5), threading.Event()
    with bind("127.0.0.1", 0) as sock:
        thread = threading.Thread(target=server.run_on, args=(sock, ready.set), daemon=True)
        thread.start()
        assert ready.wait(30)
        try:
            yield Running(url(sock), worker, server)
        finally:
            server._loop.call_soon_threadsafe(server.stop)
            thread.join(30)
            one.reset()
        assert not thread.is_alive()


def routed(members: Members, test: Callable[[Router], Awaitable[T]], **options: object) -> T:
    """Runs a test with a router in front of workers, and checks that nothing is left afterwards."""

    async def run() -> T:
        router = Router(members, **options)
        await router.start()
        try:
            return await test(router)
        finally:
            await router.drain(0)
            await router.close()
            await asyncio.sleep(0)
            assert not router.live
            assert not any(member.load for member in members.all)
            left = {task for task in asyncio.all_tasks() if not task.done()} - {asyncio.current_task()}
            assert not left, left

    return asyncio.run(run())


async def tokens(router: Router, prompt: Sequence[int], **params: object) -> list[int]:
    """Returns the tokens that the workers generate for a prompt.

    Raises:
      CmxError, Interrupted: The request failed.
    """
    generation = await router.generate([(list(prompt), SamplingParams(**{"ignore_eos": True} | params))])
    try:
        return [token async for chunk in generation for token in chunk.tokens]
    finally:
        generation.close()
