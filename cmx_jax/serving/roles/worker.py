"""A worker, which prefills or decodes for a router: HTTP routes over a `Service`."""

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
from cmx_jax.serving.engine.timeline import TraceEvent
from cmx_jax.serving.http import error_responses
from cmx_jax.serving.http.error_responses import Gone
from cmx_jax.serving.http.guard import BodyLimit, Keys
from cmx_jax.serving.http.streaming import GenerationStream, unless_gone
from cmx_jax.serving.kv import Ticket, TransferError, fetch
from cmx_jax.serving.roles.messages import (
    DecodeLine,
    DecodeRequest,
    PrefillAnswer,
    PrefillRequest,
    ScoreRequest,
    WorkerStatus,
    logprobs_from_json,
    logprobs_to_json,
)
from cmx_jax.serving.roles.peer import Peer, PeerError
from cmx_jax.serving.scheduling.request import Request as Prompt
from cmx_jax.serving.service.frontend import Unavailable
from cmx_jax.serving.service.generation import Chunk, Generation, Interrupted
from cmx_jax.serving.service.service import Service

routes = APIRouter(prefix="/internal")
MAX_BODY_BYTES = 64 << 20
FETCHES = 64  # at once, so that a fetch that hangs does not block others


@dataclass(frozen=True, kw_only=True)
class Worker:
    """State of a worker's routes.

    Attributes:
      role: Role of the worker, `prefill` or `decode`.
      deployment: Instances of the worker, all of one kind.
      service: Service over the instances' engine.
      fingerprint: Fingerprint of the instances' pages.
      secret: Secret that all processes share.
      senders: Clients of the prefill workers from which pages were fetched, by URL.
      fetching: Threads that fetch pages.
    """

    role: str
    deployment: Deployment
    service: Service
    fingerprint: Fingerprint
    secret: str
    senders: dict[str, Peer] = field(default_factory=dict)
    fetching: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(FETCHES, "kv-fetch"))

    def sender(self, control: str) -> Peer:
        """Returns the client of a prefill worker.

        Raises:
          CmxError: The URL is invalid.
        """
        if control not in self.senders:
            self.senders[control] = Peer(control, self.secret)
        return self.senders[control]


def make_worker(worker: Worker) -> FastAPI:
    """Makes a worker's app. Its lifespan starts and stops the service."""

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
    error_responses.handle(app)
    app.include_router(routes)
    app.add_api_route("/health", health)
    app.add_middleware(BodyLimit, max_bytes=MAX_BODY_BYTES)
    app.add_middleware(Keys, keys=[worker.secret], admin=[])
    return app


async def health(request: Request) -> JSONResponse:
    """Answers 200 while requests are taken, else 503."""
    service = request.app.state.worker.service
    well = not (service.draining or service.broken)
    return JSONResponse({"status": "ok" if well else service.broken or "draining"}, 200 if well else 503)


@routes.get("/status")
async def status(request: Request) -> WorkerStatus:
    """Returns the worker's identity and load."""
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
        counters=service.counters(),
        kv={"waiting": service.engine.outbox.waiting, **service.engine.outbox.counts},
    )


@routes.get("/trace")
async def trace(request: Request) -> list[TraceEvent]:
    """Returns the newest events of requests and steps."""
    events: list[TraceEvent] = request.app.state.worker.service.engine.timeline.events()
    return events


@routes.post("/prefill")
async def prefill(body: PrefillRequest, request: Request) -> Response:
    """Runs a prompt. Its pages are kept until they are fetched with the ticket in the answer."""
    service = request.app.state.worker.service
    params, submitted = body.params.to_sampling(), []

    def submit() -> Prompt:
        prompt = service.engine.submit(body.prompt, params, priority=body.priority, namespace=body.namespace)
        prompt.transfer_id = body.transfer_id
        submitted.append(prompt)
        return prompt

    try:
        generation = await service.submit_all(submit)
        chunk = await unless_gone(request, _first_chunk(generation))
        if await request.is_disconnected():
            raise Gone
    except BaseException:
        with contextlib.suppress(Unavailable):
            await _withdraw(service, submitted)
        raise
    ticket = service.engine.mover.tickets.pop(chunk.request, None)
    answer = PrefillAnswer(
        token=chunk.tokens[0],
        logprob=logprobs_to_json(chunk.logprobs)[0] if chunk.logprobs else None,
        drafts=chunk.request.drafts,
        reused_tokens=chunk.request.cached_tokens,
        finish_reason=None if ticket else chunk.finish_reason,
        kv_transfer_params=ticket.as_dict() if ticket else None,
    )
    return JSONResponse(answer.model_dump())


async def _first_chunk(generation: Generation) -> Chunk:
    try:
        return await anext(generation)
    finally:
        generation.close()


async def _withdraw(service: Service, prompts: list[Prompt]) -> None:
    """Withdraws pages whose ticket was not sent.

    The engine handles the cancellation before this call, so the pages are either there by now, or never will
    be.
    """
    engine = service.engine
    tickets = await service.call(lambda: [engine.mover.tickets.pop(prompt, None) for prompt in prompts])
    for ticket in filter(None, tickets):
        engine.outbox.withdraw(ticket.transfer_id)


@routes.post("/kv/{transfer_id}/{action}")
async def kv(transfer_id: int, action: str, request: Request) -> dict[str, bool]:
    """Renews, acknowledges or withdraws pages that were prefilled here; false if they are no longer held."""
    outbox = request.app.state.worker.service.engine.outbox
    calls = {"renew": outbox.renew, "acknowledge": outbox.acknowledge, "withdraw": outbox.withdraw}
    if action not in calls:
        raise CmxError(f"{action!r} of a ticket, expected one of {', '.join(calls)}")
    return {"done": await asyncio.to_thread(calls[action], transfer_id)}


@routes.post("/decode")
async def decode(body: DecodeRequest, request: Request) -> Response:
    """Fetches a prompt's pages and continues the prompt; the answer has one line for each step."""
    worker: Worker = request.app.state.worker
    if worker.service.draining:
        raise Unavailable("the worker is shutting down: its requests go to others")
    params, ticket = body.params.to_sampling(), Ticket.from_dict(body.kv_transfer_params)
    pages = await unless_gone(request, _fetch_pages(worker, body.control, ticket))
    engine = worker.service.engine
    generation = await worker.service.submit_all(
        lambda: engine.receive(
            body.prompt,
            params,
            first=body.first,
            drafts=body.drafts,
            pages=pages,
            priority=body.priority,
            logprob=logprobs_from_json([body.logprob])[0] if body.logprob else None,
        ),
        already_sent=1,
    )
    return GenerationStream(_lines(generation), generation, "application/x-ndjson")


async def _fetch_pages(worker: Worker, control: str, ticket: Ticket) -> Any:
    """Fetches pages, and acknowledges them so that their sender can free them."""
    engine, sender = worker.service.engine, worker.sender(control)
    tree = jax.tree.structure(engine.decode.programs.cache.pages)
    try:
        renewed = await sender.kv(ticket.transfer_id, "renew")
    except PeerError as error:
        raise TransferError(f"the pages cannot be fetched: {error}") from None
    if not renewed:
        raise TransferError(f"{control} does not have the pages any more: their lease has ended")
    heartbeat = asyncio.create_task(_renew(sender, ticket))
    pull = functools.partial(fetch, ticket, engine.outbox.transport, worker.fingerprint, tree)
    try:
        pages = await asyncio.get_running_loop().run_in_executor(worker.fetching, pull)
    finally:
        heartbeat.cancel()
    with contextlib.suppress(CmxError):  # the pages have arrived; at the sender, their lease ends
        await sender.kv(ticket.transfer_id, "acknowledge")
    return pages


async def _renew(sender: Peer, ticket: Ticket) -> None:
    while True:
        await asyncio.sleep(ticket.lease_s / 3)
        with contextlib.suppress(CmxError):
            await sender.kv(ticket.transfer_id, "renew")


async def _lines(generation: Generation) -> AsyncIterator[bytes]:
    try:
        async for chunk in generation:
            line = DecodeLine(
                tokens=chunk.tokens,
                logprobs=logprobs_to_json(chunk.logprobs),
                finish_reason=chunk.finish_reason,
            )
            yield line.model_dump_json().encode() + b"\n"
    except Interrupted as error:
        yield DecodeLine(error=str(error)).model_dump_json().encode() + b"\n"


@routes.post("/score")
async def score(body: ScoreRequest, request: Request) -> Response:
    """Returns the log-probability of each token of prompts; the first token of a prompt has none."""
    worker: Worker = request.app.state.worker
    scores: Sequence[Sequence[Any]] = await worker.service.score(body.prompts, body.top)
    return JSONResponse([[None, *logprobs_to_json(list(row[1:]))] for row in scores])
