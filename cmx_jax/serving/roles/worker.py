"""A process that prefills or decodes for a router: `Service` behind a few routes."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import jax
from fastapi import APIRouter, FastAPI, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse

from cmx_jax.errors import CmxError
from cmx_jax.serving.api import errors
from cmx_jax.serving.api.guard import BodyLimit, Keys
from cmx_jax.serving.api.streaming import unless_gone
from cmx_jax.serving.deployment import Deployment
from cmx_jax.serving.ems.keys import Fingerprint
from cmx_jax.serving.generation import Generation, Interrupted
from cmx_jax.serving.kv import Ticket, TransferError, fetch
from cmx_jax.serving.roles.messages import (
    DecodeLine,
    DecodeRequest,
    PrefillAnswer,
    PrefillRequest,
    ScoreRequest,
    said,
)
from cmx_jax.serving.roles.peer import Peer
from cmx_jax.serving.service import Service

routes = APIRouter(prefix="/internal")
MAX_BODY_BYTES = 64 << 20


@dataclass(frozen=True, kw_only=True)
class Worker:
    """What a worker's routes work on.

    Attributes:
      role: `prefill` or `decode`.
      deployment: its instances, of one kind.
      service: over their engine.
      fingerprint: of their pages.
      secret: that all roles share.
    """

    role: str
    deployment: Deployment
    service: Service
    fingerprint: Fingerprint
    secret: str


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
async def status(request: Request) -> dict[str, Any]:
    """Who this is, and how much there is to do."""
    worker: Worker = request.app.state.worker
    service = worker.service
    return {
        "role": worker.role,
        "model": worker.deployment.model.directory.name,
        "max_model_len": worker.deployment.max_model_len,
        "fingerprint": vars(worker.fingerprint),
        "draining": service.draining,
        "instances": service.instances(worker.deployment.npus),
        "counts": service.counts(),
        "kv": {"waiting": service.engine.outbox.waiting, **service.engine.outbox.counts},
    }


@routes.get("/trace")
async def trace(request: Request) -> list[dict[str, Any]]:
    """What happened here."""
    events: list[dict[str, Any]] = request.app.state.worker.service.engine.timeline.events()
    return events


@routes.post("/prefill")
async def prefill(body: PrefillRequest, request: Request) -> Response:
    """Runs a prompt; its pages wait for whoever has the ticket."""
    service = request.app.state.worker.service
    asked = [(body.prompt, body.params.sampling())]
    generation = await service.generate(asked, priority=body.priority, namespace=body.namespace)
    try:
        answer = await unless_gone(request, _prefilled(service, generation))
    finally:
        generation.close()
    return JSONResponse(answer.model_dump())


async def _prefilled(service: Service, generation: Generation) -> PrefillAnswer:
    async for chunk in generation:
        ticket: Ticket | None = None
        if chunk.finish_reason == "transfer":
            ticket = await service.call(lambda of=chunk.request: service.engine.tickets.pop(of))  # type: ignore[misc]
        return PrefillAnswer(
            token=chunk.tokens[0],
            logprob=said(chunk.logprobs)[0] if chunk.logprobs else None,
            drafts=chunk.request.drafts,
            reused_tokens=chunk.request.reused_tokens,
            finish_reason=None if ticket else chunk.finish_reason,
            kv_transfer_params=ticket.as_dict() if ticket else None,
        )
    raise Interrupted("the request ended without a token")


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
    params, ticket = body.params.sampling(), Ticket.from_dict(body.kv_transfer_params)
    pages = await unless_gone(request, _fetched(worker, body.control, ticket))
    engine = worker.service.engine
    generation = await worker.service.adopt(
        lambda: engine.receive(
            body.prompt,
            params,
            first=body.first,
            drafts=body.drafts,
            pages=pages,
            priority=body.priority,
        ),
        told=1,
    )
    return StreamingResponse(_lines(generation), media_type="application/x-ndjson")


async def _fetched(worker: Worker, control: str, ticket: Ticket) -> Any:
    """Pages, and the news to their sender that it may free them."""
    engine = worker.service.engine
    tree = jax.tree.structure(engine.decode.cache.pages)
    async with Peer(control, worker.secret) as sender:
        if not await sender.kv(ticket.transfer_id, "renew"):
            raise TransferError(f"{control} does not have the pages any more: their lease has ended")
        heartbeat = asyncio.create_task(_renewing(sender, ticket))
        try:
            pages = await asyncio.to_thread(fetch, ticket, engine.outbox.transport, worker.fingerprint, tree)
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
    finally:
        generation.close()


@routes.post("/score")
async def score(body: ScoreRequest, request: Request) -> Response:
    """Log-probabilities of given tokens; the first one of each text has none."""
    worker: Worker = request.app.state.worker
    scores: Sequence[Sequence[Any]] = await worker.service.score(body.prompts, body.top)
    return JSONResponse([[None, *said(list(of[1:]))] for of in scores])
