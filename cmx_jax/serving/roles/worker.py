"""A process that prefills or decodes for a router: `Service` behind a few routes."""

import asyncio
import contextlib
import functools
from collections.abc import AsyncIterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import jax
from fastapi import APIRouter, FastAPI, Request
from fastapi.responses import JSONResponse, Response

from cmx_jax.errors import CmxError
from cmx_jax.serving.deploy.deployment import Deployment
from cmx_jax.serving.ems.keys import Fingerprint
from cmx_jax.serving.http import errors
from cmx_jax.serving.http.errors import Gone
from cmx_jax.serving.http.guard import BodyLimit, Keys
from cmx_jax.serving.http.streaming import Stream, unless_gone
from cmx_jax.serving.kv import Ticket, TransferError, fetch
from cmx_jax.serving.roles.messages import (
    DecodeLine,
    DecodeRequest,
    PrefillAnswer,
    PrefillRequest,
    ScoreRequest,
    WorkerStatus,
    heard,
    said,
)
from cmx_jax.serving.roles.peer import Peer, PeerError
from cmx_jax.serving.scheduling.request import Request as Prompt
from cmx_jax.serving.service.frontend import Unavailable
from cmx_jax.serving.service.generation import Chunk, Generation, Interrupted
from cmx_jax.serving.service.service import Service

routes = APIRouter(prefix="/internal")
MAX_BODY_BYTES = 64 << 20
FETCHES = 64  # at once; one that hangs holds up no other one


@dataclass(frozen=True, kw_only=True)
class Worker:
    """What a worker's routes work on.

    Attributes:
      role: `prefill` or `decode`.
      deployment: its instances, of one kind.
      service: over their engine.
      fingerprint: of their pages.
      secret: that all roles share.
      senders: prefill workers whose pages were fetched, by URL.
      fetching: the threads that do so.
    """

    role: str
    deployment: Deployment
    service: Service
    fingerprint: Fingerprint
    secret: str
    senders: dict[str, Peer] = field(default_factory=dict)
    fetching: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(FETCHES, "kv-fetch"))

    def sender(self, control: str) -> Peer:
        """A prefill worker.

        Raises:
          CmxError: the URL is none.
        """
        if control not in self.senders:
            self.senders[control] = Peer(control, self.secret)
        return self.senders[control]


def make_worker(worker: Worker) -> FastAPI:
    """A worker's app; its lifespan is the service's."""

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        await worker.service.start()
        worker.service.engine.outbox.watch()
        yield
        await worker.service.drain(0)
        await asyncio.to_thread(worker.service.stop)
        worker.service.engine.outbox.close()
        worker.fetching.shutdown(wait=False, cancel_futures=True)
        for sender in worker.senders.values():
            await sender.close()

    app = FastAPI(title=f"cmx_jax {worker.role}", lifespan=lifespan, openapi_url=None)
    app.state.worker = worker
    errors.handle(app)
    app.include_router(routes)
    app.add_api_route("/health", health)
    app.add_middleware(BodyLimit, most=MAX_BODY_BYTES)
    app.add_middleware(Keys, keys=[worker.secret], admin=[])
    return app


async def health(request: Request) -> JSONResponse:
    """200 while requests are taken."""
    service = request.app.state.worker.service
    well = not (service.draining or service.broken)
    return JSONResponse({"status": "ok" if well else service.broken or "draining"}, 200 if well else 503)


@routes.get("/status")
async def status(request: Request) -> WorkerStatus:
    """Who this is, and how much there is to do."""
    worker: Worker = request.app.state.worker
    service = worker.service
    return WorkerStatus(
        role=worker.role,
        model=worker.deployment.model.directory.name,
        max_model_len=worker.deployment.max_model_len,
        fingerprint=vars(worker.fingerprint),
        draining=service.draining,
        broken=service.broken,
        instances=service.instances(worker.deployment.npus),
        counts=service.counts(),
        kv={"waiting": service.engine.outbox.waiting, **service.engine.outbox.counts},
    )


@routes.get("/trace")
async def trace(request: Request) -> list[dict[str, Any]]:
    """What happened here."""
    events: list[dict[str, Any]] = request.app.state.worker.service.engine.timeline.events()
    return events


@routes.post("/prefill")
async def prefill(body: PrefillRequest, request: Request) -> Response:
    """Runs a prompt; its pages wait for whoever has the ticket."""
    service = request.app.state.worker.service
    params, asked = body.params.sampling(), []

    def submit() -> Prompt:
        of = service.engine.submit(body.prompt, params, priority=body.priority, namespace=body.namespace)
        of.transfer_id = body.transfer_id
        asked.append(of)
        return of

    try:
        generation = await service.submit_all(submit)
        chunk = await unless_gone(request, _prefilled(generation))
        if await request.is_disconnected():
            raise Gone
    except BaseException:
        with contextlib.suppress(Unavailable):
            await _forgotten(service, asked)
        raise
    ticket = service.engine.tickets.pop(chunk.request, None)
    answer = PrefillAnswer(
        token=chunk.tokens[0],
        logprob=said(chunk.logprobs)[0] if chunk.logprobs else None,
        drafts=chunk.request.drafts,
        reused_tokens=chunk.request.cached_tokens,
        finish_reason=None if ticket else chunk.finish_reason,
        kv_transfer_params=ticket.as_dict() if ticket else None,
    )
    return JSONResponse(answer.model_dump())


async def _prefilled(generation: Generation) -> Chunk:
    try:
        return await anext(generation)
    finally:
        generation.close()


async def _forgotten(service: Service, asked: list[Prompt]) -> None:
    """Withdraws pages whose ticket nobody was given. The cancellation comes before this: at last they are
    either there, or never will be."""
    engine = service.engine
    tickets = await service.call(lambda: [engine.tickets.pop(of, None) for of in asked])
    for ticket in filter(None, tickets):
        engine.outbox.withdraw(ticket.transfer_id)


@routes.post("/kv/{transfer_id}/{what}")
async def kv(transfer_id: int, what: str, request: Request) -> dict[str, bool]:
    """`renew`, `acknowledge` or `withdraw` what was prefilled here; False: it is gone."""
    outbox = request.app.state.worker.service.engine.outbox
    calls = {"renew": outbox.renew, "acknowledge": outbox.acknowledge, "withdraw": outbox.withdraw}
    if what not in calls:
        raise CmxError(f"{what!r} of a ticket, expected one of {', '.join(calls)}")
    return {"done": await asyncio.to_thread(calls[what], transfer_id)}


@routes.post("/decode")
async def decode(body: DecodeRequest, request: Request) -> Response:
    """Fetches a prompt's pages and continues it, a line for each step."""
    worker: Worker = request.app.state.worker
    if worker.service.draining:
        raise Unavailable("the worker is shutting down: its requests go to others")
    params, ticket = body.params.sampling(), Ticket.from_dict(body.kv_transfer_params)
    pages = await unless_gone(request, _fetched(worker, body.control, ticket))
    engine = worker.service.engine
    generation = await worker.service.submit_all(
        lambda: engine.receive(
            body.prompt,
            params,
            first=body.first,
            drafts=body.drafts,
            pages=pages,
            priority=body.priority,
            logprob=heard([body.logprob])[0] if body.logprob else None,
        ),
        already_sent=1,
    )
    return Stream(_lines(generation), generation, "application/x-ndjson")


async def _fetched(worker: Worker, control: str, ticket: Ticket) -> Any:
    """Pages, and the news to their sender that it may free them."""
    engine, sender = worker.service.engine, worker.sender(control)
    tree = jax.tree.structure(engine.decode.programs.cache.pages)
    try:
        there = await sender.kv(ticket.transfer_id, "renew")
    except PeerError as error:
        raise TransferError(f"the pages cannot be fetched: {error}") from None
    if not there:
        raise TransferError(f"{control} does not have the pages any more: their lease has ended")
    heartbeat = asyncio.create_task(_renewing(sender, ticket))
    pull = functools.partial(fetch, ticket, engine.outbox.transport, worker.fingerprint, tree)
    try:
        pages = await asyncio.get_running_loop().run_in_executor(worker.fetching, pull)
    finally:
        heartbeat.cancel()
    with contextlib.suppress(CmxError):  # they are here; there the lease ends
        await sender.kv(ticket.transfer_id, "acknowledge")
    return pages


async def _renewing(sender: Peer, ticket: Ticket) -> None:
    while True:
        await asyncio.sleep(ticket.lease_s / 3)
        with contextlib.suppress(CmxError):
            await sender.kv(ticket.transfer_id, "renew")


async def _lines(generation: Generation) -> AsyncIterator[bytes]:
    try:
        async for chunk in generation:
            line = DecodeLine(
                tokens=chunk.tokens, logprobs=said(chunk.logprobs), finish_reason=chunk.finish_reason
            )
            yield line.model_dump_json().encode() + b"\n"
    except Interrupted as error:
        yield DecodeLine(error=str(error)).model_dump_json().encode() + b"\n"


@routes.post("/score")
async def score(body: ScoreRequest, request: Request) -> Response:
    """Log-probabilities of given tokens; the first one of each text has none."""
    worker: Worker = request.app.state.worker
    scores: Sequence[Sequence[Any]] = await worker.service.score(body.prompts, body.top)
    return JSONResponse([[None, *said(list(of[1:]))] for of in scores])
