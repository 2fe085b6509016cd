"""Flags of the caching pool, for every process that has one."""

import argparse
import contextlib
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from cmx_jax.errors import CmxError

MIB = 1 << 20


def add_store(group: Any) -> None:
    """Of a store in this process."""
    kept = "folder of its disk tier, found again behind a restart (default: a temporary one)"
    group.add_argument("--cache-dir", type=Path, metavar="DIR", help=kept)
    group.add_argument("--cache-dram-mb", type=int, default=256, help="of its DRAM tier, MiB (default 256)")
    group.add_argument("--cache-disk-mb", type=int, default=1024, help="of its disk tier, MiB (default 1024)")
    quota = "MiB that a namespace may have on disk; may be given several times"
    group.add_argument("--cache-quota", action="append", metavar="NAMESPACE=MB", default=[], help=quota)


def add_pool(group: Any) -> None:
    """Of a pool: in this process, or elsewhere."""
    group.add_argument("--no-context-cache", action="store_true", help="run every prompt as a whole")
    group.add_argument("--cache-block", type=int, default=128, help="tokens of a block (default 128)")
    generated = "keep what was generated, too; not for models whose thinking is left out of the next turn"
    group.add_argument("--cache-generated", action="store_true", help=generated)
    add_where(group)


def add_where(group: Any) -> None:
    """Where it is."""
    server = "a cache server (cmx serve --role cache); may be given several times"
    group.add_argument("--cache-server", action="append", metavar="HOST:PORT", default=[], help=server)
    group.add_argument("--cache-valkey", metavar="URL", help="a Redis or Valkey server")
    group.add_argument("--cache-mooncake", metavar="HOST:PORT", help="the master of a Mooncake store")
    add_store(group)


@contextlib.contextmanager
def store(args: argparse.Namespace) -> Iterator[Any]:
    """A store in this process, as told; a temporary folder is gone afterwards.

    Raises:
      CmxError: a size or quota is none, or the folder or memory cannot be had.
    """
    from cmx_jax.serving.ems import MPServer

    for name in ("cache_dram_mb", "cache_disk_mb"):
        if getattr(args, name) < 1:
            raise CmxError(f"{name} is {getattr(args, name)}, expected at least 1")
    with contextlib.ExitStack() as stack:
        folder = args.cache_dir
        if folder is None:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="cmx-cache-")))
        made = MPServer(
            folder,
            dram=args.cache_dram_mb * MIB,
            disk=args.cache_disk_mb * MIB,
            quotas=dict(map(_quota, args.cache_quota)),
        )
        stack.callback(made.close)
        yield made


def _quota(text: str) -> tuple[str, int]:
    namespace, _, number = text.rpartition("=")
    if not namespace or not number.isdecimal():
        raise CmxError(f"--cache-quota {text!r}, expected NAMESPACE=MB")
    return namespace, int(number) * MIB


@contextlib.contextmanager
def pool(args: argparse.Namespace, secret: str) -> Iterator[Any]:
    """The caching pool, as told.

    Raises:
      CmxError: as `store`; or an address is none, or a package is missing, or a server cannot be reached.
    """
    from cmx_jax.serving.ems import Pool, RemoteStore

    elsewhere: dict[str, Any] = {at: RemoteStore(at, secret=secret) for at in args.cache_server}
    if args.cache_valkey:
        from cmx_jax.serving.ems.valkey import ValkeyStore

        elsewhere[args.cache_valkey] = ValkeyStore(args.cache_valkey)
    if args.cache_mooncake:
        from cmx_jax.serving.ems.mooncake import MooncakeStore

        try:
            elsewhere[args.cache_mooncake] = MooncakeStore(args.cache_mooncake)
        except OSError as error:
            raise CmxError(f"--cache-mooncake {args.cache_mooncake}: {error}") from None
    with contextlib.ExitStack() as stack:
        made = Pool(elsewhere or {"here": stack.enter_context(store(args))})
        stack.callback(made.close)
        yield made
