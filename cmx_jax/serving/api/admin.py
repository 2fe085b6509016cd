"""Routes for whoever runs the server: what it does, and changing it."""

from typing import Any

from fastapi import APIRouter, Request
from pydantic import BaseModel, ConfigDict, Field

from cmx_jax.errors import CmxError
from cmx_jax.serving.api.served import Served
from cmx_jax.serving.deploy.deployment import Deployment
from cmx_jax.serving.engine.timeline import together

router = APIRouter(prefix="/admin")


class PoolsRequest(BaseModel):
    """How many instances of each kind there shall be."""

    model_config = ConfigDict(extra="forbid")

    prefill: int = Field(ge=1, le=384)
    decode: int = Field(default=1, ge=1, le=384)
    grace_s: float = Field(default=30.0, ge=0, le=3600)


@router.post("/drain")
async def drain(request: Request) -> dict[str, Any]:
    """Takes no new request from now on; those that run go on."""
    service = request.app.state.served.service
    service.draining = True
    return {"status": "draining", "running": len(service.live)}


@router.get("/requests")
async def requests(request: Request) -> dict[str, Any]:
    """Every request that is not finished: its state, and how far it is."""
    return {
        "requests": [
            {
                "id": r.id,
                "state": r.state.value,
                "priority": r.priority,
                "prompt_tokens": len(r.prompt),
                "cached_tokens": r.cached_tokens,
                "generated_tokens": len(r.tokens),
                "max_tokens": r.params.max_tokens,
            }
            for r in list(request.app.state.served.service.live)
        ]
    }


@router.post("/pools")
async def pools(body: PoolsRequest, request: Request) -> dict[str, Any]:
    """Changes the ratio of prefill to decode while serving: instances drain and are carved anew.

    The answer comes when the new instances are ready; those that leave have `grace_s` seconds from then on.
    """
    served: Served = request.app.state.served
    deployment = served.deployment
    if not isinstance(deployment, Deployment):
        raise CmxError("the workers are processes of their own: start or stop some of them instead")
    await served.service.call(lambda: deployment.recarve(body.prefill, body.decode, body.grace_s))
    return {"prefill": body.prefill, "decode": body.decode, "grace_s": body.grace_s}


@router.get("/trace")
async def trace(request: Request) -> dict[str, Any]:
    """The newest events of requests and steps, for ui.perfetto.dev; of all workers, where there are some."""
    return together(await request.app.state.served.service.timelines())
