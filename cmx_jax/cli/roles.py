"""The roles of `cmx serve` besides `all`, and instances that span several processes."""

import argparse
import contextlib
import os
import signal
import sys
import threading
from collections.abc import Callable
from typing import Any

from cmx_jax.cli import caching, hosting
from cmx_jax.errors import CmxError
from cmx_jax.serving.deploy.engine_args import EngineArgs


def router(args: argparse.Namespace) -> None:
    """Serves OpenAI's API in front of workers."""
    from cmx_jax.serving.deploy.deployment import ModelInfo
    from cmx_jax.serving.deploy.model import Model
    from cmx_jax.serving.http.server import bind
    from cmx_jax.serving.roles.members import Members
    from cmx_jax.serving.roles.router import Router
    from cmx_jax.serving.scheduling.waiting import QueueLimits

    # `Members` has the time that a request waits for a worker
    limits = QueueLimits(**{name: getattr(args, name) for name in hosting.LIMITS[:2]})
    with bind(args.host, args.port) as sock:
        model = Model.read(args.model)
        members = Members(args.prefill, args.decode, args.cluster_secret, args.queue_ttl_s)
        context = model.config.max_position_embeddings
        length = min(context, 4096) if args.max_model_len is None else args.max_model_len
        hosted = ModelInfo(name="router", model=model, max_model_len=length)
        frontend = Router(members, policy=args.kv_failure_policy, limits=limits)
        hosting.answer_api(args, sock, hosted, frontend)


def worker(args: argparse.Namespace) -> None:
    """Serves an instance that prefills or decodes."""
    from cmx_jax.serving.http.server import Server, bind, url
    from cmx_jax.serving.roles.worker import Worker, make_worker
    from cmx_jax.serving.service.service import Service

    if args.role == "decode" and not args.cache_generated:
        args.no_context_cache = True  # a decode worker never looks up blocks
    with bind(args.host, args.port) as sock, hosting.cached(args) as pool:
        deployment = hosting.deployed(args)
        if pool is not None:
            deployment.cache(pool, args.cache_block, args.cache_generated)
        state = Worker(
            role=args.role,
            deployment=deployment,
            service=Service(deployment.engine),
            fingerprint=deployment.fingerprint,
            secret=args.cluster_secret,
        )
        server = Server(make_worker(state), state.service, args.shutdown_timeout_s)
        ready = f"cmx: {args.role} worker at {url(sock)}"
        server.run_on(sock, lambda: print(ready, flush=True))
    hosting.leave(state.service)


def spanning(args: argparse.Namespace, run: Callable[[argparse.Namespace], None]) -> Any:
    """Returns the function for a process of several: the first one runs `run`, the others follow it."""
    from cmx_jax.serving.executor.spanning import Leader, Span, follow

    span = Span(coordinator=args.distributed, processes=args.num_processes, index=args.process_id)
    if args.runner not in (None, "devices"):
        raise CmxError(f"runner is {args.runner!r}, expected devices: lanes are on one device")
    args.runner = "devices"
    span.start(EngineArgs().ranks if args.ranks is None else args.ranks)

    def lead(deployment: Any) -> None:
        [instance] = deployment.engine.instances
        leader = Leader(span, args.cluster_secret)
        instance.programs.tell = leader.tell

    def follows(deployment: Any) -> None:
        [instance] = deployment.engine.instances
        print(f"cmx: process {span.index} of {span.processes} follows {span.coordinator}", flush=True)
        follow(span, args.cluster_secret, instance)
        raise Followed

    def ends(args: argparse.Namespace) -> None:
        with contextlib.suppress(Followed):
            (hosting.deployed if span.index else run)(args)
        sys.stderr.flush()
        os._exit(0)  # an orderly exit would wait for the other processes, which may be gone

    args.joined = follows if span.index else lead
    return ends


class Followed(Exception):
    """The process that this one followed has ended."""


def cache(args: argparse.Namespace) -> None:
    """Runs a cache server until SIGTERM or SIGINT."""
    from cmx_jax.serving.ems import serve as listen

    ended = threading.Event()
    for sign in (signal.SIGTERM, signal.SIGINT):
        signal.signal(sign, lambda *_: ended.set())
    with caching.store(args) as store:
        try:
            server = listen(store, secret=args.cluster_secret, host=args.host, port=args.port)
        except OSError as error:
            raise CmxError(
                f"{args.host}:{args.port} cannot be bound ({error.strerror}): choose another --port"
            ) from None
        print(f"cmx: cache server at {args.host}:{server.port}", flush=True)
        ended.wait()
        server.stop()
