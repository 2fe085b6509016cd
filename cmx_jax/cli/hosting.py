"""Parts of `cmx serve` that all of its roles share: deployment, caching pool, API and exit."""

import argparse
import contextlib
import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from cmx_jax.cli import caching
from cmx_jax.cli.common import engine_options, progress
from cmx_jax.cli.recipes import changes_recipe, recipe_of
from cmx_jax.errors import CmxError

LIMITS = ("max_num_queued_reqs", "max_num_queued_tokens", "queue_ttl_s")


def cached(args: argparse.Namespace) -> Any:
    """Opens the caching pool, or yields None."""
    return contextlib.nullcontext() if args.no_context_cache else caching.pool(args, args.cluster_secret)


def answer_api(args: argparse.Namespace, sock: Any, deployment: Any, service: Any) -> None:
    """Serves OpenAI's API over a service or router, until a signal."""
    from cmx_jax.serving.api.app import make_app
    from cmx_jax.serving.api.context import ApiContext, Limits
    from cmx_jax.serving.api.template import ChatTemplate
    from cmx_jax.serving.http.server import Server, url

    context = ApiContext(
        name=args.served_model_name or Path(args.model).resolve().name,
        deployment=deployment,
        service=service,
        template=ChatTemplate.read(deployment.model.directory),
        limits=Limits(max_body_bytes=args.max_body_bytes, max_choices=args.max_choices),
    )
    server = Server(make_app(context, args.api_key, args.admin_key), service, args.shutdown_timeout_s)
    ready = f"cmx: {context.name} is served at {url(sock)}/v1, its status at {url(sock)}/"
    server.run_on(sock, lambda: print(ready, flush=True))


def leave(service: Any) -> None:
    """Ends the process, even while XLA compiles in a thread that crashes at an orderly exit."""
    if not service.stop(0):
        sys.stderr.flush()
        os._exit(0)


def deployed(args: argparse.Namespace) -> Any:
    """The model on its instances, with short sequences' programs compiled."""
    from cmx_jax.serving.deploy.deployment import colocated, pools, warm_up, worker
    from cmx_jax.serving.scheduling.waiting import QueueLimits

    tell = progress()
    limits = QueueLimits(**{name: getattr(args, name) for name in LIMITS})
    in_pools = args.deployment == "pools" and args.role == "all"
    flag = changes_recipe(args)
    if flag and not in_pools:
        raise CmxError(f"{flag} is for --deployment pools: leave it out")
    tell("loading")
    if in_pools:
        # the caching pool is that of the flags
        deployment = pools(args.model, replace(recipe_of(args), cache_block=0))
    elif args.role == "all":
        deployment = colocated(args.model, **engine_options(args))
    else:
        deployment = worker(args.role, args.model, host=args.host, **engine_options(args))
    args.joined(deployment)
    tell("compiling (kept for the next time)")
    warm_up(deployment.engine)
    deployment.engine.limits = limits
    tell("")
    return deployment
