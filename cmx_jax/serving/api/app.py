"""The app: all routes of the API, over one served model."""

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from importlib.metadata import version

from fastapi import APIRouter, FastAPI, Request
from fastapi.responses import Response
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest

from cmx_jax.serving.api import admin, chat, completions, status
from cmx_jax.serving.api.context import ApiContext
from cmx_jax.serving.api.metrics import Metrics
from cmx_jax.serving.api.schemas import Document
from cmx_jax.serving.http import error_responses
from cmx_jax.serving.http.guard import BodyLimit, Keys

router = APIRouter()


def make_app(context: ApiContext, api_keys: Sequence[str] = (), admin_keys: Sequence[str] = ()) -> FastAPI:
    """Makes the app. Its lifespan starts and stops the service.

    Args:
      context: Served model; its service is not started yet.
      api_keys: Keys of all routes but `/health` and `/admin`; without keys, these routes need none.
      admin_keys: Keys of the routes below `/admin`; without keys, these routes are closed.
    """

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        await context.service.start()
        yield
        await context.service.drain(0)
        await context.service.close()

    app = FastAPI(
        title="cmx_jax",
        version=version("cmx_jax"),
        description="OpenAI's API on a virtual CloudMatrix384 supernode.",
        lifespan=lifespan,
        docs_url=None,  # these pages would load scripts from other hosts
        redoc_url=None,
        responses={
            **{status: {"description": name} for status, name in error_responses.TYPES.items()},
            "default": {
                "description": "an error in OpenAI's form"
            },  # else the schema lists 422, which is never sent
        },
    )
    app.state.context, app.state.metrics = context, Metrics(context)
    context.service.watchers.append(app.state.metrics.watch)
    error_responses.handle(app)
    for part in (router, completions.router, chat.router, status.router, admin.router):
        app.include_router(part)
    app.add_middleware(BodyLimit, max_bytes=context.limits.max_body_bytes)
    app.add_middleware(Keys, keys=api_keys, admin=admin_keys)  # added last: runs first
    return app


def _model(context: ApiContext) -> Document:
    return {
        "id": context.name,
        "object": "model",
        "created": context.created,
        "owned_by": "cmx_jax",
        "max_model_len": context.deployment.max_model_len,
    }


@router.get("/v1/models")
async def models(request: Request) -> Document:
    """Lists the only model."""
    return {"object": "list", "data": [_model(request.app.state.context)]}


@router.get("/v1/models/{model:path}")
async def model(model: str, request: Request) -> Document:
    """Returns the model with this name."""
    context: ApiContext = request.app.state.context
    context.check_name(model)
    return _model(context)


@router.get("/metrics")
async def metrics(request: Request) -> Response:
    """Returns the metrics in Prometheus's text format."""
    registry = request.app.state.metrics.registry
    text = await asyncio.to_thread(generate_latest, registry)  # in a thread, as cache servers are asked, too
    return Response(text, media_type=CONTENT_TYPE_LATEST)
