"""Flags of the caching pool, for every command that uses one."""

import argparse
import contextlib
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from cmx_jax.errors import CmxError

MIB = 1 << 20


def add_store(group: Any) -> None:
    """Adds the flags of a store in this process."""
    folder = "folder of the disk tier, whose blocks survive a restart (default: a temporary folder)"
    group.add_argument("--cache-dir", type=Path, metavar="DIR", help=folder)
    group.add_argument(
        "--cache-dram-mb", type=int, default=256, help="size of the DRAM tier in MiB (default 256)"
    )
    group.add_argument(
        "--cache-disk-mb", type=int, default=1024, help="size of the disk tier in MiB (default 1024)"
    )
    quota = "largest size of a namespace on disk, in MiB; may be given several times"
    group.add_argument("--cache-quota", action="append", metavar="NAMESPACE=MB", default=[], help=quota)


def add_pool(group: Any) -> None:
    """Adds the flags of a pool of context blocks."""
    group.add_argument(
        "--no-context-cache", action="store_true", help="use no caching pool: compute every prompt as a whole"
    )
    group.add_argument(
        "--cache-block", type=int, default=128, help="tokens per block of the caching pool (default 128)"
    )
    generated = "store generated tokens, too; not for models whose next turn leaves the thinking out"
    group.add_argument("--cache-generated", action="store_true", help=generated)
    add_where(group)


def add_where(group: Any) -> None:
    """Adds the flags that choose the pool's stores, in this process or in others."""
    server = "address of a cache server (cmx serve --role cache); may be given several times"
    group.add_argument("--cache-server", action="append", metavar="HOST:PORT", default=[], help=server)
    group.add_argument(
        "--cache-valkey", metavar="URL", help="URL of a Redis or Valkey server that stores the blocks"
    )
    group.add_argument(
        "--cache-mooncake",
        metavar="HOST:PORT",
        help="address of the master of a Mooncake store that stores the blocks",
    )
    add_store(group)


@contextlib.contextmanager
def store(args: argparse.Namespace) -> Iterator[Any]:
    """Opens the store of this process. A temporary folder is removed afterwards.

    Raises:
      CmxError: A size or quota is invalid, or the folder or the memory cannot be used.
    """
    from cmx_jax.serving.ems import MPServer

    for name in ("cache_dram_mb", "cache_disk_mb"):
        if getattr(args, name) < 1:
            raise CmxError(f"{name} is {getattr(args, name)}, expected at least 1")
    with contextlib.ExitStack() as stack:
        folder = args.cache_dir
        if folder is None:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="cmx-cache-")))
        server = MPServer(
            folder,
            dram=args.cache_dram_mb * MIB,
            disk=args.cache_disk_mb * MIB,
            quotas=dict(map(_quota, args.cache_quota)),
        )
        stack.callback(server.close)
        yield server


def _quota(text: str) -> tuple[str, int]:
    namespace, _, number = text.rpartition("=")
    if not namespace or not number.isdecimal():
        raise CmxError(f"--cache-quota {text!r}, expected NAMESPACE=MB")
    return namespace, int(number) * MIB


@contextlib.contextmanager
def pool(args: argparse.Namespace, secret: str) -> Iterator[Any]:
    """Opens the caching pool.

    Raises:
      CmxError: The store cannot be opened (see `store`), an address is invalid, a package is missing, or a
        server cannot be reached.
    """
    from cmx_jax.serving.ems import Pool, RemoteStore, Store

    stores: dict[str, Store] = {address: RemoteStore(address, secret=secret) for address in args.cache_server}
    if args.cache_valkey:
        from cmx_jax.serving.ems.valkey import ValkeyStore

        stores[args.cache_valkey] = ValkeyStore(args.cache_valkey)
    if args.cache_mooncake:
        from cmx_jax.serving.ems.mooncake import MooncakeStore

        try:
            stores[args.cache_mooncake] = MooncakeStore(args.cache_mooncake)
        except OSError as error:
            raise CmxError(f"--cache-mooncake {args.cache_mooncake}: {error}") from None
    with contextlib.ExitStack() as stack:
        blocks = Pool(stores or {"here": stack.enter_context(store(args))})
        stack.callback(blocks.close)
        yield blocks
