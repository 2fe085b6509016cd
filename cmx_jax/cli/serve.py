"""`cmx serve`: OpenAI's API over a model, in one process or as a role of several."""

import argparse
import os
from typing import Any

from cmx_jax.cli import caching, roles
from cmx_jax.cli.common import add_engine_options
from cmx_jax.cli.hosting import POOLS, answer_api, cached, deployed, leave
from cmx_jax.errors import CmxError

QUEUE = 1024  # requests that may wait
UNSET = (
    "runner", "ranks", "exchange", "max_num_seqs", "max_num_batched_tokens", "num_speculative_tokens",
)  # fmt: skip
ROLES = ("all", "prefill", "decode", "router", "cache")


def add(verbs: Any) -> None:
    """The verb and its flags."""
    verb = verbs.add_parser("serve", help="answer OpenAI's API over HTTP")
    verb.set_defaults(run=_serve)
    about = "a Hugging Face directory, or tiny; not for --role cache"
    verb.add_argument("model", metavar="MODEL", nargs="?", help=about)
    _add_http(verb.add_argument_group("HTTP"))
    _add_roles(verb.add_argument_group("several processes"))
    _add_span(verb.add_argument_group("an instance that spans processes"))
    _add_engine(verb.add_argument_group("engine"))
    caching.add_pool(verb.add_argument_group("caching pool"))
    add_engine_options(verb, "model", "exchange", "decode", num_speculative_tokens=1)
    # None: the default depends on the deployment and the model
    verb.set_defaults(**dict.fromkeys(UNSET))


def _add_http(group: Any) -> None:
    group.add_argument("--host", default="127.0.0.1", help="address to listen on (default 127.0.0.1)")
    group.add_argument("--port", type=int, default=8000, help="0 takes a free one (default 8000)")
    group.add_argument("--served-model-name", metavar="NAME", help="for clients (default: MODEL's last part)")
    keys = "may be given several times; CMX_API_KEY is one, too (default: none is needed)"
    group.add_argument("--api-key", action="append", metavar="KEY", default=[], help=keys)
    admin = "of routes below /admin (default: closed)"
    group.add_argument("--admin-key", action="append", metavar="KEY", default=[], help=admin)
    group.add_argument("--max-body-bytes", type=int, default=8 << 20, help="of a request (default 8 MiB)")
    group.add_argument("--max-choices", type=int, default=256, help="prompts times n (default 256)")
    wait = "that running requests have to finish (default 30)"
    group.add_argument("--shutdown-timeout-s", type=float, default=30.0, help=wait)


def _add_roles(group: Any) -> None:
    about = "all (default), or one of: a router, workers that prefill or decode, a cache server"
    group.add_argument("--role", choices=ROLES, default="all", help=about)
    secret = "that all roles share; or CMX_CLUSTER_SECRET"
    group.add_argument("--cluster-secret", metavar="SECRET", help=secret)
    for role in ("prefill", "decode"):
        worker = f"a {role} worker of a router; may be given several times"
        group.add_argument(f"--{role}", action="append", metavar="URL", default=[], help=worker)
    lost = "when a worker or pages are lost: recompute (default), or fail the request"
    group.add_argument("--kv-failure-policy", choices=("recompute", "fail"), default="recompute", help=lost)


def _add_span(group: Any) -> None:
    whose = "of process 0, that all have; the next port is used, too"
    group.add_argument("--distributed", metavar="HOST:PORT", help=whose)
    group.add_argument("--num-processes", type=int, default=2, help="that the instance spans (default 2)")
    group.add_argument("--process-id", type=int, default=0, help="0 serves, the others follow it (default 0)")


def _add_engine(group: Any) -> None:
    names = ("colocated", "pools")
    about = "one instance (default), or the supernode's pools, with hierarchical exchange"
    group.add_argument("--deployment", choices=names, default="colocated", help=about)
    for name, usual in POOLS.items():
        flag = f"--{name.replace('_', '-')}"
        group.add_argument(flag, type=int, help=f"of pools (default {usual})")
    add_engine_options(group, "size")
    queued = f"requests that may wait; further ones get 429 (default {QUEUE})"
    group.add_argument("--max-num-queued-reqs", type=int, default=QUEUE, help=queued)
    group.add_argument("--max-num-queued-tokens", type=int, help="prompt tokens that may wait, likewise")
    group.add_argument("--queue-ttl-s", type=float, help="that a request waits before it fails")


def _serve(args: argparse.Namespace) -> None:
    args.api_key += filter(None, [os.environ.get("CMX_API_KEY")])
    args.joined = lambda _: None  # is told of the instance, before anything runs on it
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

    with bind(args.host, args.port) as sock, cached(args) as pool:
        deployment = deployed(args)
        if pool is not None:
            deployment.cache(pool, args.cache_block, args.cache_generated)
        service = Service(deployment.engine)
        answer_api(args, sock, deployment, service)
    leave(service)
