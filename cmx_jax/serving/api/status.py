"""What a server is doing now: `GET /status`, a page that draws it, and whether it is healthy."""

from importlib.resources import files
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import HTMLResponse, JSONResponse

from cmx_jax.mesh.supernode import CLOUDMATRIX384
from cmx_jax.serving.api.context import ApiContext

router = APIRouter()


@router.get("/status")
async def status(request: Request) -> dict[str, Any]:
    """Instances, queues, totals since the start, and the engine's seconds."""
    served: ApiContext = request.app.state.served
    return {
        "model": served.name,
        "deployment": served.deployment.name,
        "max_model_len": served.deployment.max_model_len,
        "supernode": {"name": CLOUDMATRIX384.name, "npus": CLOUDMATRIX384.npus},
        "state": served.service.broken or ("draining" if served.service.draining else "serving"),
        "instances": served.service.instances(served.deployment.npus),
        **served.service.counts(),
        **request.app.state.metrics.totals(),
    }


@router.get("/", response_class=HTMLResponse)
async def page() -> HTMLResponse:
    """The status as a page; it asks `/status` each second."""
    return HTMLResponse((files("cmx_jax") / "serving" / "api" / "status.html").read_text(encoding="utf-8"))


@router.get("/health")
async def health(request: Request) -> JSONResponse:
    """200 while requests are taken, 503 when the server drains or its engine is broken."""
    service = request.app.state.served.service
    well = not (service.draining or service.broken)
    return JSONResponse({"status": "ok" if well else service.broken or "draining"}, 200 if well else 503)
