"""Routes for the operator of a server: its requests and events, and changes while it runs."""

from fastapi import APIRouter, Request
from pydantic import BaseModel, ConfigDict, Field

from cmx_jax.errors import CmxError
from cmx_jax.serving.api.context import ApiContext
from cmx_jax.serving.api.schemas import Document
from cmx_jax.serving.deploy.deployment import Deployment
from cmx_jax.serving.engine.timeline import together

router = APIRouter(prefix="/admin")


class PoolsRequest(BaseModel):
    """Number of instances of each kind from now on, and the seconds that removed instances have to finish."""

    model_config = ConfigDict(extra="forbid")

    prefill: int = Field(ge=1, le=384)
    decode: int = Field(default=1, ge=1, le=384)
    grace_s: float = Field(default=30.0, ge=0, le=3600)


@router.post("/drain")
async def drain(request: Request) -> Document:
    """Refuses new requests from now on; running requests continue."""
    service = request.app.state.context.service
    service.draining = True
    return {"status": "draining", "running": len(service.live)}


@router.get("/requests")
async def requests(request: Request) -> Document:
    """Returns the state and progress of every request that is not finished."""
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
            for r in list(request.app.state.context.service.live)
        ]
    }


@router.post("/pools")
async def pools(body: PoolsRequest, request: Request) -> Document:
    """Changes the numbers of prefill and decode instances while serving.

    Instances drain and are carved again. The answer is sent when the new instances are ready; removed ones
    have `grace_s` seconds from then on.
    """
    context: ApiContext = request.app.state.context
    deployment = context.deployment
    if not isinstance(deployment, Deployment):
        raise CmxError("the workers are processes of their own: start or stop some of them instead")
    await context.service.call(lambda: deployment.recarve(body.prefill, body.decode, body.grace_s))
    return {"prefill": body.prefill, "decode": body.decode, "grace_s": body.grace_s}


@router.get("/trace")
async def trace(request: Request) -> Document:
    """Returns the newest events of requests and steps, of all workers if any, for ui.perfetto.dev."""
    return together(await request.app.state.context.service.timelines())
