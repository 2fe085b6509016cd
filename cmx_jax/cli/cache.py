"""`cmx cache`: models in the caching pool, and the pool's statistics."""

import argparse
import json
import os
from pathlib import Path
from typing import Any

from cmx_jax.cli import caching
from cmx_jax.cli.common import add_json, show
from cmx_jax.errors import CmxError


def add(verbs: Any) -> None:
    """Adds the verb, its subverbs and their flags."""
    cache = verbs.add_parser("cache", help="store and load models in the caching pool; show its statistics")
    kinds = cache.add_subparsers(dest="kind", required=True, metavar="KIND")
    store = kinds.add_parser("store", help="store a checkpoint directory in the pool; print the model's id")
    store.add_argument("directory", metavar="DIR", help="checkpoint directory, or tiny")
    load = kinds.add_parser(
        "load", help="write a model of the pool to a directory; print where its bytes came from"
    )
    load.add_argument("id", metavar="ID", help="id of the model, as printed by cmx cache store")
    load.add_argument("directory", type=Path, metavar="DIR", help="directory to write, empty or new")
    source = "directory from which to read blocks that the pool no longer has (a cold start)"
    load.add_argument("--source", metavar="DIR", help=source)
    stats = kinds.add_parser("stats", help="show counters, and the content of each server")
    for verb, run in ((store, _store), (load, _load), (stats, _stats)):
        verb.set_defaults(run=run)
        verb.add_argument("--namespace", default="models", help="namespace of the pool (default models)")
        verb.add_argument(
            "--cluster-secret", default="", help="secret of the cache servers (default: CMX_CLUSTER_SECRET)"
        )
        caching.add_where(verb)
        add_json(verb)


def _pool(args: argparse.Namespace) -> Any:
    if not (args.cache_dir or args.cache_server or args.cache_valkey or args.cache_mooncake):
        raise CmxError("which pool? give --cache-dir, --cache-server, --cache-valkey or --cache-mooncake")
    return caching.pool(args, args.cluster_secret or os.environ.get("CMX_CLUSTER_SECRET", ""))


def _store(args: argparse.Namespace) -> None:
    from cmx_jax.serving.deploy.model import locate
    from cmx_jax.serving.ems import store_model

    with _pool(args) as pool:
        result = {"id": store_model(pool, locate(args.directory), args.namespace)}
    show(result, args.json, lambda r: r["id"])


def _load(args: argparse.Namespace) -> None:
    from cmx_jax.serving.deploy.model import locate
    from cmx_jax.serving.ems import load_model

    source = None if args.source is None else locate(args.source)
    with _pool(args) as pool:
        loaded = load_model(pool, args.id, args.directory, args.namespace, source)
    start = "cold" if loaded.nbytes.get("source") else "warm"
    result = {"start": start, "seconds": loaded.seconds, "bytes": loaded.nbytes}
    parts = ", ".join(f"{size / 1e6:,.1f} MB from {origin}" for origin, size in loaded.nbytes.items())
    show(result, args.json, lambda _: f"{start} start: {loaded.seconds:.2f} s, {parts}")


def _stats(args: argparse.Namespace) -> None:
    with _pool(args) as pool:
        result = pool.stats()
    show(result, args.json, lambda r: json.dumps(r, indent=2))
