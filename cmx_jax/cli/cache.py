"""`cmx cache`: models in the caching pool, and what the pool holds."""

import argparse
import json
import os
from pathlib import Path
from typing import Any

from cmx_jax.cli import caching
from cmx_jax.cli.common import add_json, show
from cmx_jax.errors import CmxError


def add(verbs: Any) -> None:
    """The verbs and their flags."""
    cache = verbs.add_parser("cache", help="models in the caching pool; what the pool holds")
    kinds = cache.add_subparsers(dest="kind", required=True, metavar="KIND")
    store = kinds.add_parser("store", help="put a checkpoint directory into the pool; prints its id")
    store.add_argument("directory", metavar="DIR", help="a directory, or tiny")
    load = kinds.add_parser("load", help="write a model of the pool to a directory, and say how it came")
    load.add_argument("id", metavar="ID", help="as cmx cache store prints it")
    load.add_argument("directory", type=Path, metavar="DIR", help="to be made")
    source = "directory that blocks are read from which the pool has no more (a cold start)"
    load.add_argument("--source", metavar="DIR", help=source)
    stats = kinds.add_parser("stats", help="counters, and what each server holds")
    for verb, run in ((store, _store), (load, _load), (stats, _stats)):
        verb.set_defaults(run=run)
        verb.add_argument("--namespace", default="models", help="of the pool (default models)")
        verb.add_argument("--cluster-secret", default="", help="of cache servers; or CMX_CLUSTER_SECRET")
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
        found = {"id": store_model(pool, locate(args.directory), args.namespace)}
    show(found, args.json, lambda r: r["id"])


def _load(args: argparse.Namespace) -> None:
    from cmx_jax.serving.deploy.model import locate
    from cmx_jax.serving.ems import load_model

    source = None if args.source is None else locate(args.source)
    with _pool(args) as pool:
        loaded = load_model(pool, args.id, args.directory, args.namespace, source)
    start = "cold" if loaded.nbytes.get("source") else "warm"
    found = {"start": start, "seconds": loaded.seconds, "bytes": loaded.nbytes}
    show(found, args.json, _rendered)


def _rendered(found: dict[str, Any]) -> str:
    parts = ", ".join(f"{size / 1e6:,.1f} MB from {where}" for where, size in found["bytes"].items())
    return f"{found['start']} start: {found['seconds']:.2f} s, {parts}"


def _stats(args: argparse.Namespace) -> None:
    with _pool(args) as pool:
        found = pool.stats()
    show(found, args.json, lambda r: json.dumps(r, indent=2))
