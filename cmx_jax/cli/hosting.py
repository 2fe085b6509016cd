"""Parts of `cmx serve` that all of its roles share: the deployment, the caching pool, the API and the end."""

import argparse
import contextlib
import os
import sys
from pathlib import Path
from typing import Any

from cmx_jax.cli import caching
from cmx_jax.cli.common import engine_options, progress
from cmx_jax.errors import CmxError

POOLS = {"prefill_instances": 6, "decode_instances": 1}
LIMITS = ("max_num_queued_reqs", "max_num_queued_tokens", "queue_ttl_s")


def cached(args: argparse.Namespace) -> Any:
    """The caching pool, or None."""
    return contextlib.nullcontext() if args.no_context_cache else caching.pool(args, args.cluster_secret)


def answer_api(args: argparse.Namespace, sock: Any, deployment: Any, service: Any) -> None:
    """OpenAI's API over a service or router, until it is told to stop."""
    from cmx_jax.serving.api.app import make_app
    from cmx_jax.serving.api.served import Limits, Served
    from cmx_jax.serving.api.template import ChatTemplate
    from cmx_jax.serving.http.server import Server, url

    served = Served(
        name=args.served_model_name or Path(args.model).resolve().name,
        deployment=deployment,
        service=service,
        template=ChatTemplate.read(deployment.model.directory),
        limits=Limits(max_body_bytes=args.max_body_bytes, max_choices=args.max_choices),
    )
    server = Server(make_app(served, args.api_key, args.admin_key), service, args.shutdown_timeout_s)
    ready = f"cmx: {served.name} is served at {url(sock)}/v1, its status at {url(sock)}/"
    server.run_on(sock, lambda: print(ready, flush=True))


def leave(service: Any) -> None:
    """Ends the process, also where XLA still compiles in a thread that does not survive an orderly end."""
    if not service.stop(0):
        sys.stderr.flush()
        os._exit(0)


def deployed(args: argparse.Namespace) -> Any:
    """The model on its instances, with short sequences' programs compiled."""
    from cmx_jax.serving.deploy.deployment import colocated, pools, warm_up, worker
    from cmx_jax.serving.scheduling.waiting import QueueLimits

    tell = progress()
    options = engine_options(args)
    limits = QueueLimits(**{name: getattr(args, name) for name in LIMITS})
    in_pools = args.deployment == "pools" and args.role == "all"
    _check_unused(args, POOLS if not in_pools else ("ranks",), "pools" if not in_pools else "colocated")
    tell("loading")
    if in_pools:
        counts = {name.split("_")[0]: getattr(args, name) or default for name, default in POOLS.items()}
        sequences = _sequences(options.pop("max_num_seqs", None))
        deployment = pools(args.model, **counts, sequences=sequences, **options)
    elif args.role == "all":
        deployment = colocated(args.model, **options)
    else:
        deployment = worker(args.role, args.model, host=args.host, **options)
    args.joined(deployment)
    tell("compiling (kept for the next time)")
    warm_up(deployment.engine)
    deployment.engine.limits = limits
    tell("")
    return deployment


def _sequences(max_num_seqs: int | None) -> int:
    """Returns the sequences per decode rank with which the first decode instance has `max_num_seqs`."""
    from cmx_jax.mesh.pools import DECODE_NPUS

    return 1 if max_num_seqs is None else -(-max_num_seqs // DECODE_NPUS)


def _check_unused(args: argparse.Namespace, names: Any, of: str) -> None:
    for name in names:
        if getattr(args, name) is not None:
            raise CmxError(f"--{name.replace('_', '-')} is of --deployment {of}: leave it out")
