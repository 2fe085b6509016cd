"""`cmx serve`: OpenAI's API over a model."""

import argparse
import os
import sys
from pathlib import Path
from typing import Any

from cmx_jax.cli.common import (
    add_exchange_options,
    add_model_options,
    add_spread_options,
    parallelism,
    progress,
)
from cmx_jax.errors import CmxError

QUEUE = 1024  # requests that may wait
# of one instance that does everything; pools have sizes of their own
COLOCATED = {"max_num_seqs": 32, "max_num_batched_tokens": 2048, "runner": "lanes", "ranks": 8}
PREFILL_INSTANCES = 6
LIMITS = ("max_num_queued_reqs", "max_num_queued_tokens", "queue_ttl_s")


def add(verbs: Any) -> None:
    """The verb and its flags."""
    verb = verbs.add_parser("serve", help="answer OpenAI's API over HTTP")
    verb.set_defaults(run=_serve)
    verb.add_argument("model", metavar="MODEL", help="a Hugging Face directory, or tiny")
    _add_http(verb.add_argument_group("HTTP"))
    _add_engine(verb.add_argument_group("engine"))
    add_model_options(verb)
    add_exchange_options(verb)
    add_spread_options(verb, num_speculative_tokens=1)
    # None: what was not said depends on the deployment and the model
    verb.set_defaults(**dict.fromkeys((*COLOCATED, "exchange", "num_speculative_tokens")))


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


def _add_engine(group: Any) -> None:
    names = ("colocated", "pools")
    about = "one instance (default), or the supernode's pools, with hierarchical exchange"
    group.add_argument("--deployment", choices=names, default="colocated", help=about)
    group.add_argument("--prefill-instances", type=int, help=f"of pools (default {PREFILL_INSTANCES})")
    group.add_argument("--max-num-seqs", type=int, help="decoded at once (default 32)")
    group.add_argument("--max-model-len", type=int, help="tokens of the longest sequence")
    group.add_argument("--max-num-batched-tokens", type=int, help="of a prefill step's row (default 2048)")
    queued = f"requests that may wait; further ones get 429 (default {QUEUE})"
    group.add_argument("--max-num-queued-reqs", type=int, default=QUEUE, help=queued)
    group.add_argument("--max-num-queued-tokens", type=int, help="prompt tokens that may wait, likewise")
    group.add_argument("--queue-ttl-s", type=float, help="that a request waits before it fails")


def _serve(args: argparse.Namespace) -> None:
    api_keys = [*args.api_key, *filter(None, [os.environ.get("CMX_API_KEY")])]
    if not all((*api_keys, *args.admin_key)):
        raise CmxError("a key is empty, expected at least one character")
    if not args.shutdown_timeout_s >= 0:
        raise CmxError(f"shutdown_timeout_s is {args.shutdown_timeout_s}, expected zero or more")

    from cmx_jax.serving.api.app import make_app
    from cmx_jax.serving.api.served import Limits, Served
    from cmx_jax.serving.api.server import Server, bind, url
    from cmx_jax.serving.api.template import ChatTemplate
    from cmx_jax.serving.service import Service

    limits = Limits(max_body_bytes=args.max_body_bytes, max_choices=args.max_choices)
    with bind(args.host, args.port) as sock:
        deployment = _deploy(args)
        served = Served(
            name=args.served_model_name or Path(args.model).resolve().name,
            deployment=deployment,
            service=Service(deployment.engine),
            template=ChatTemplate.read(deployment.model.directory),
            limits=limits,
        )
        server = Server(make_app(served, api_keys, args.admin_key), served.service, args.shutdown_timeout_s)
        ready = f"cmx: {served.name} is served at {url(sock)}/v1, its status at {url(sock)}/"
        server.run_on(sock, lambda: print(ready, flush=True))
    if not served.service.stop(0):
        sys.stderr.flush()
        os._exit(0)  # XLA may be compiling in a thread that does not survive an orderly end


def _deploy(args: argparse.Namespace) -> Any:
    """The model on its instances, with short sequences' programs compiled."""
    from cmx_jax.serving.deployment import QueueLimits, colocated, pools, warm_up

    tell, of_one = progress(), {name: getattr(args, name) for name in COLOCATED}
    common: dict[str, Any] = {"max_model_len": args.max_model_len, "dtype": args.dtype, "quant": args.quant}
    common |= parallelism(args)
    limits = QueueLimits(**{name: getattr(args, name) for name in LIMITS})
    tell("loading")
    if args.deployment == "pools":
        if given := [name for name, value in of_one.items() if value is not None]:
            raise CmxError(f"--{given[0].replace('_', '-')} is of --deployment colocated: leave it out")
        common["exchange"] = args.exchange or "hierarchical"
        prefill = PREFILL_INSTANCES if args.prefill_instances is None else args.prefill_instances
        deployment = pools(args.model, prefill=prefill, **common)
    else:
        if args.prefill_instances is not None:
            raise CmxError("--prefill-instances is of --deployment pools: leave it out")
        common["exchange"] = args.exchange or "flat"
        sizes: dict[str, Any] = {
            name: usual if of_one[name] is None else of_one[name] for name, usual in COLOCATED.items()
        }
        deployment = colocated(args.model, **sizes, **common)
    tell("compiling (kept for the next time)")
    warm_up(deployment.engine)
    limits.apply(deployment.engine)
    tell("")
    return deployment
