"""`cmx serve`: OpenAI's API over a model, in one process or as a role of several."""

import argparse
import os
from dataclasses import fields
from typing import Any

from cmx_jax.cli import caching, roles
from cmx_jax.cli.common import add_engine_options
from cmx_jax.cli.hosting import answer_api, cached, deployed, leave
from cmx_jax.cli.recipes import add_recipe, recipe_of
from cmx_jax.errors import CmxError
from cmx_jax.serving.deploy.engine_args import EngineArgs

QUEUE = 1024  # default limit of waiting requests
ROLES = ("all", "prefill", "decode", "router", "cache")


def add(verbs: Any) -> None:
    """Adds the verb and its flags."""
    verb = verbs.add_parser("serve", help="serve OpenAI's API over HTTP")
    verb.set_defaults(run=_serve)
    about = "Hugging Face directory, or tiny; not for --role cache"
    verb.add_argument("model", metavar="MODEL", nargs="?", help=about)
    _add_http(verb.add_argument_group("HTTP"))
    _add_roles(verb.add_argument_group("several processes"))
    _add_span(verb.add_argument_group("an instance that spans processes"))
    _add_engine(verb.add_argument_group("engine"))
    caching.add_pool(verb.add_argument_group("caching pool"))
    add_engine_options(verb, "model", "exchange", "decode", num_speculative_tokens=1)
    # None: the default depends on the deployment and the model
    verb.set_defaults(**dict.fromkeys(f.name for f in fields(EngineArgs)))


def _add_http(group: Any) -> None:
    group.add_argument("--host", default="127.0.0.1", help="address to listen on (default 127.0.0.1)")
    group.add_argument(
        "--port", type=int, default=8000, help="port to listen on, 0 for any free one (default 8000)"
    )
    group.add_argument(
        "--served-model-name",
        metavar="NAME",
        help="name of the model for clients (default: the last part of MODEL)",
    )
    keys = "key for clients, besides CMX_API_KEY; may be given several times (default: no key is needed)"
    group.add_argument("--api-key", action="append", metavar="KEY", default=[], help=keys)
    admin = "key for the routes below /admin; may be given several times (default: they are closed)"
    group.add_argument("--admin-key", action="append", metavar="KEY", default=[], help=admin)
    group.add_argument(
        "--max-body-bytes", type=int, default=8 << 20, help="largest request body in bytes (default 8 MiB)"
    )
    group.add_argument(
        "--max-choices",
        type=int,
        default=256,
        help="largest number of choices per request, prompts times n (default 256)",
    )
    wait = "seconds that running requests have to finish at shutdown (default 30)"
    group.add_argument("--shutdown-timeout-s", type=float, default=30.0, help=wait)


def _add_roles(group: Any) -> None:
    about = "role of this process: all (default), a worker (prefill or decode), a router, or a cache server"
    group.add_argument("--role", choices=ROLES, default="all", help=about)
    secret = "secret that all processes share (default: CMX_CLUSTER_SECRET)"
    group.add_argument("--cluster-secret", metavar="SECRET", help=secret)
    for role in ("prefill", "decode"):
        worker = f"URL of a {role} worker, for --role router; may be given several times"
        group.add_argument(f"--{role}", action="append", metavar="URL", default=[], help=worker)
    lost = "reaction to the loss of a worker or of pages: recompute (default), or fail the request"
    group.add_argument("--kv-failure-policy", choices=("recompute", "fail"), default="recompute", help=lost)


def _add_span(group: Any) -> None:
    address = "address of process 0, the same for all processes; the port after it is used, too"
    group.add_argument("--distributed", metavar="HOST:PORT", help=address)
    group.add_argument(
        "--num-processes", type=int, default=2, help="number of processes that the instance spans (default 2)"
    )
    group.add_argument(
        "--process-id",
        type=int,
        default=0,
        help="index of this process; 0 serves, the others follow it (default 0)",
    )


def _add_engine(group: Any) -> None:
    names = ("colocated", "pools")
    about = "colocated: one instance (default); pools: the paper's deployment, on all of the supernode"
    group.add_argument("--deployment", choices=names, default="colocated", help=about)
    add_recipe(group)
    add_engine_options(group, "size")
    queued = f"largest number of waiting requests; more get status 429 (default {QUEUE})"
    group.add_argument("--max-num-queued-reqs", type=int, default=QUEUE, help=queued)
    group.add_argument(
        "--max-num-queued-tokens",
        type=int,
        help="largest number of waiting prompt tokens; more get status 429",
    )
    group.add_argument("--queue-ttl-s", type=float, help="seconds after which a waiting request fails")


def _serve(args: argparse.Namespace) -> None:
    args.api_key += filter(None, [os.environ.get("CMX_API_KEY")])
    args.joined = lambda _: None  # called with the deployment before anything runs on it
    args.cluster_secret = args.cluster_secret or os.environ.get("CMX_CLUSTER_SECRET", "")
    if not all((*args.api_key, *args.admin_key)):
        raise CmxError("a key is empty, expected at least one character")
    if not args.shutdown_timeout_s >= 0:
        raise CmxError(f"shutdown_timeout_s is {args.shutdown_timeout_s}, expected zero or more")
    if args.role != "all" and not args.cluster_secret:
        raise CmxError(f"--role {args.role} needs the secret that all roles share: give --cluster-secret")
    if args.distributed and (args.role in ("router", "cache") or args.deployment == "pools"):
        raise CmxError("--distributed is for one instance: leave it out for pools, routers and cache servers")
    if args.distributed and not args.cluster_secret:
        raise CmxError("--distributed needs the secret that all processes share: give --cluster-secret")
    if args.model is None and args.role != "cache":
        raise CmxError("expected MODEL: a Hugging Face directory, or tiny")
    run = {"all": _all, "router": roles.router, "cache": roles.cache}.get(args.role, roles.worker)
    if args.distributed:
        run = roles.spanning(args, run)
    run(args)


def _all(args: argparse.Namespace) -> None:
    from cmx_jax.serving.http.server import bind
    from cmx_jax.serving.service.service import Service

    if args.deployment == "pools" and not recipe_of(args).cache_block:
        args.no_context_cache = True
    with bind(args.host, args.port) as sock, cached(args) as pool:
        deployment = deployed(args)
        if pool is not None:
            deployment.cache(pool, args.cache_block, args.cache_generated)
        service = Service(deployment.engine)
        answer_api(args, sock, deployment, service)
    leave(service)
