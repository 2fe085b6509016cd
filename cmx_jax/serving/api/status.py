"""What a server is doing now: `GET /status`, a page that draws it, and whether it is healthy."""

from importlib.resources import files
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import HTMLResponse, JSONResponse

from cmx_jax.mesh.supernode import CLOUDMATRIX384
from cmx_jax.serving.api.served import Served
from cmx_jax.serving.instance import Instance

router = APIRouter()


def counts(served: Served) -> dict[str, Any]:
    """Numbers of the whole engine.

    They are read while it runs: each is right, but they may be a step apart.
    """
    engine, instances = served.deployment.engine, served.deployment.engine.instances
    drafts, context = [i.traffic for i in engine.decoders], engine.context
    return {
        "waiting": len(engine.waiting),
        "transfers": len(engine.transfers),
        "running": sum(len(i.places) for i in instances),
        "kv_cache_usage": sum(i.load for i in instances) / sum(i.capacity.pages * i.ranks for i in instances),
        "prefix_queries": context.queries if context else 0,
        "prefix_hits": context.hits if context else 0,
        "drafts": sum(int(t.proposed.sum()) for t in drafts),
        "accepted": sum(int(t.accepted.sum()) for t in drafts),
        "busy_s": served.service.busy_s,
        "step_s": engine.step_s,
        "steps": engine.steps,
    }


def _instance(served: Served, i: Instance) -> dict[str, Any]:
    engine = served.deployment.engine
    first, npus = served.deployment.npus.get(i.name, (0, i.layout.ranks))
    return {
        "name": i.name,
        "roles": [role for role, of in (("prefill", engine.prefill), ("decode", engine.decoders)) if i in of],
        "first_npu": first,
        "npus": npus,
        "requests": len(i.places),
        "prefilling": len(i.prefilling),
        "pages_used": i.load,
        "pages": i.capacity.pages * i.ranks,
    }


@router.get("/status")
async def status(request: Request) -> dict[str, Any]:
    """Instances, queues, totals since the start, and the engine's seconds."""
    served: Served = request.app.state.served
    return {
        "model": served.name,
        "deployment": served.deployment.name,
        "max_model_len": served.deployment.max_model_len,
        "supernode": {"name": CLOUDMATRIX384.name, "npus": CLOUDMATRIX384.npus},
        "state": served.service.broken or ("draining" if served.service.draining else "serving"),
        "instances": [_instance(served, i) for i in served.deployment.engine.instances],
        **counts(served),
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
