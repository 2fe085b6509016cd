"""The state of a server: `GET /status`, a page that draws it, and a health check."""

from dataclasses import asdict
from importlib.resources import files

from fastapi import APIRouter, Request
from fastapi.responses import HTMLResponse, JSONResponse

from cmx_jax.mesh.supernode import CLOUDMATRIX384
from cmx_jax.serving.api.context import ApiContext
from cmx_jax.serving.api.schemas import Document

router = APIRouter()


@router.get("/status")
async def status(request: Request) -> Document:
    """Returns instances, queues, totals since the start, and the engine's seconds."""
    context: ApiContext = request.app.state.context
    service = context.service
    return {
        "model": context.name,
        "deployment": context.deployment.name,
        "max_model_len": context.deployment.max_model_len,
        "supernode": {"name": CLOUDMATRIX384.name, "npus": CLOUDMATRIX384.npus},
        "state": service.broken or ("draining" if service.draining else "serving"),
        "instances": [asdict(load) for load in service.instances(context.deployment.npus)],
        "workers": [asdict(worker) for worker in service.workers()],
        **asdict(service.counters()),
        **request.app.state.metrics.totals(),
    }


@router.get("/", response_class=HTMLResponse)
async def page() -> HTMLResponse:
    """Returns a page that shows the status and asks `/status` each second."""
    return HTMLResponse((files("cmx_jax") / "serving" / "api" / "status.html").read_text(encoding="utf-8"))


@router.get("/health")
async def health(request: Request) -> JSONResponse:
    """Answers 200 while requests are taken, 503 when the server drains or its engine is broken."""
    service = request.app.state.context.service
    well = not (service.draining or service.broken)
    return JSONResponse({"status": "ok" if well else service.broken or "draining"}, 200 if well else 503)
