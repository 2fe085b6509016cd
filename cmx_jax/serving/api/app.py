"""The app: all routes over one served model."""

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from importlib.metadata import version
from typing import Any

from fastapi import APIRouter, FastAPI, Request
from fastapi.responses import Response
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest

from cmx_jax.serving.api import admin, chat, completions, status
from cmx_jax.serving.api.context import ApiContext
from cmx_jax.serving.api.metrics import Metrics
from cmx_jax.serving.http import errors
from cmx_jax.serving.http.guard import BodyLimit, Keys

router = APIRouter()


def make_app(served: ApiContext, api_keys: Sequence[str] = (), admin_keys: Sequence[str] = ()) -> FastAPI:
    """The app; its lifespan is the service's.

    Args:
      served: the model; its service has not started.
      api_keys: of all routes but `/health`; none: open.
      admin_keys: of `/admin`; none: closed.
    """

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        await served.service.start()
        yield
        await served.service.drain(0)
        await served.service.close()

    app = FastAPI(
        title="cmx_jax",
        version=version("cmx_jax"),
        description="OpenAI's API on a virtual CloudMatrix384 supernode.",
        lifespan=lifespan,
        docs_url=None,  # these pages load what they need from elsewhere
        redoc_url=None,
        responses={
            **{status: {"description": name} for status, name in errors.TYPES.items()},
            "default": {
                "description": "an error in OpenAI's form"
            },  # else 422 is announced, which never comes
        },
    )
    app.state.served, app.state.metrics = served, Metrics(served)
    served.service.watchers.append(app.state.metrics.watch)
    errors.handle(app)
    for part in (router, completions.router, chat.router, status.router, admin.router):
        app.include_router(part)
    app.add_middleware(BodyLimit, most=served.limits.max_body_bytes)
    app.add_middleware(Keys, keys=api_keys, admin=admin_keys)  # the outermost
    return app


def _model(served: ApiContext) -> dict[str, Any]:
    return {
        "id": served.name,
        "object": "model",
        "created": served.created,
        "owned_by": "cmx_jax",
        "max_model_len": served.deployment.max_model_len,
    }


@router.get("/v1/models")
async def models(request: Request) -> dict[str, Any]:
    """The one model."""
    return {"object": "list", "data": [_model(request.app.state.served)]}


@router.get("/v1/models/{model:path}")
async def model(model: str, request: Request) -> dict[str, Any]:
    """The model, by its name."""
    served: ApiContext = request.app.state.served
    served.check_name(model)
    return _model(served)


@router.get("/metrics")
async def metrics(request: Request) -> Response:
    """Prometheus's text."""
    registry = request.app.state.metrics.registry
    text = await asyncio.to_thread(generate_latest, registry)  # cache servers are asked, too
    return Response(text, media_type=CONTENT_TYPE_LATEST)
