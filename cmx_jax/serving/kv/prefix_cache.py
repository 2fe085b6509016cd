"""Context caching (section 4.4.2): the KV rows of prompts, stored as blocks in the caching pool.

A block holds `block` tokens of all layers, as whole pages of an instance. Its key is a chain of hashes over
all tokens up to its end, so equal prefixes have equal keys, whichever instance computed them. The chain's
root is a fingerprint of everything that the bytes depend on, and of the tenant. Blocks are written once and
never changed.

The MTP layer's row of a block's last token was computed with the token that followed it when the block was
stored. Another token may follow now; that makes a draft worse at times, and changes no text, as drafts are
verified.
"""

import hashlib
import logging
import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import replace
from typing import Any, Protocol, runtime_checkable

import jax
import numpy as np

from cmx_jax.errors import CmxError
from cmx_jax.serving.ems.keys import Fingerprint, chain, root
from cmx_jax.serving.ems.pool import PoolStats

log = logging.getLogger(__name__)


class PrefixCacheStats(PoolStats):
    """Statistics of a prefix cache: those of its pool and its own.

    Attributes:
      errors: Number of lookups and stores that failed in this process.
    """

    errors: int


def space(namespace: str) -> str:
    """Returns the pool's name for a namespace: any text becomes a name that every backend accepts."""
    return f"t-{hashlib.sha256(namespace.encode()).hexdigest()[:32]}" if namespace else "default"


@runtime_checkable
class BlockPool(Protocol):
    """The part of `cmx_jax.serving.ems.Pool` that a context cache uses."""

    def get_many(self, namespace: str, keys: Sequence[bytes]) -> list[bytes]: ...

    def put_async(self, namespace: str, key: bytes, payload: bytes) -> Any: ...

    def stats(self) -> PoolStats: ...


class ContextCache:
    """Blocks of pages of one layout in a pool.

    Attributes:
      pool: Pool that stores the bytes.
      block: Number of tokens per block.
      generated: True if generated tokens are stored, too (section 4.4.2: not for reasoning models, whose next
        turn leaves the thinking out).
      hits: Number of prompt tokens found in the pool.
      queries: Number of prompt tokens looked up.
      fetched_bytes: Number of bytes read from the pool.
      stored_bytes: Number of bytes given to the pool.
      errors: Number of lookups and stores that failed in the pool; each counts as a miss and is logged.
    """

    def __init__(self, pool: BlockPool, fingerprint: Fingerprint, pages: Any, generated: bool = False):
        """Reads and writes blocks of an instance's pages.

        Args:
          pool: Caching pool.
          fingerprint: Fingerprint of the instance; its tenant is replaced by a request's namespace.
          pages: Arrays or shapes `[P, L, W, C]` of the instance's cache.
          generated: True to store generated tokens, too.

        Raises:
          CmxError: A block is not a whole number of pages.
        """
        block, width = fingerprint.block, fingerprint.page[1]
        if block < 1 or block % width:
            raise CmxError(f"a block of the caching pool has {block} tokens, expected a multiple of {width}")
        self.pool, self.block, self._pages = pool, block, block // width
        self.generated = generated
        self._fingerprint = fingerprint
        leaves, self._tree = jax.tree.flatten(pages)
        self._leaves = [((self._pages, *leaf.shape[1:]), np.dtype(leaf.dtype)) for leaf in leaves]
        self._sizes = [int(np.prod(shape)) * dtype.itemsize for shape, dtype in self._leaves]
        self._threads = ThreadPoolExecutor(2, "context-cache")
        self._storing: set[Future[None]] = set()
        self.reset_counters()

    def reset_counters(self) -> None:
        """Sets the counters of this process to zero; the pool's own go on."""
        self.hits = self.queries = self.errors = self.fetched_bytes = self.stored_bytes = 0

    def keys(self, tokens: Sequence[int], namespace: str) -> list[bytes]:
        """Returns the keys of all full blocks of a sequence, in order."""
        return chain(root(replace(self._fingerprint, tenant=namespace)), tokens, self.block)

    def lookup(self, tokens: Sequence[int], namespace: str) -> "Future[list[Any]]":
        """Fetches the longest stored prefix in the background; at least one token is left to run.

        Returns:
          Future of the pages of each block of the prefix.
        """
        blocks = (len(tokens) - 1) // self.block
        self.queries += len(tokens)
        return self._threads.submit(self._fetch, list(tokens[: blocks * self.block]), namespace)

    def _fetch(self, tokens: Sequence[int], namespace: str) -> list[Any]:
        blocks: list[Any] = []
        try:
            for payload in self.pool.get_many(space(namespace), self.keys(tokens, namespace)):
                if len(payload) != sum(self._sizes):
                    break
                self.fetched_bytes += len(payload)
                blocks.append(self._decode(payload))
        except Exception:
            self._record_error()
        return blocks

    def _decode(self, payload: bytes) -> Any:
        leaves, offset = [], 0
        for (shape, dtype), size in zip(self._leaves, self._sizes, strict=True):
            leaves.append(np.frombuffer(payload, dtype, int(np.prod(shape)), offset).reshape(shape))
            offset += size
        return jax.tree.unflatten(self._tree, leaves)

    def store(self, tokens: Sequence[int], namespace: str, pages: Any, known: int = 0) -> None:
        """Stores the full blocks of a sequence in the background.

        Args:
          tokens: Tokens whose rows the pages hold, from the first token on.
          namespace: Namespace of the request.
          pages: Pages `[pages, L, W, C]`, on the host.
          known: Number of leading blocks that the pool already has.
        """
        count = len(tokens) // self.block
        if count > known:
            full = list(tokens[: count * self.block])
            future = self._threads.submit(self._put, full, namespace, pages, known)
            self._storing.add(future)
            future.add_done_callback(self._storing.discard)

    def _put(self, tokens: Sequence[int], namespace: str, pages: Any, known: int) -> None:
        keys, leaves = self.keys(tokens, namespace), jax.tree.leaves(pages)
        try:
            for i in range(known, len(keys)):
                rows = slice(i * self._pages, (i + 1) * self._pages)
                payload = b"".join(leaf[rows].tobytes() for leaf in leaves)
                self.stored_bytes += len(payload)
                self.pool.put_async(space(namespace), keys[i], payload)
        except Exception:
            self._record_error()

    def _record_error(self) -> None:
        self.errors += 1
        log.exception("the caching pool failed")

    def joined(self, blocks: list[Any]) -> Any:
        """Returns the pages of several blocks as one tree of arrays."""
        return jax.tree.map(lambda *parts: np.concatenate(parts), *blocks)

    def stats(self) -> PrefixCacheStats:
        """Returns the pool's statistics and the number of failed lookups and stores."""
        return {**self.pool.stats(), "errors": self.errors}

    def settle(self, timeout_s: float = 10.0) -> bool:
        """Waits until the pool has stored everything that it was given.

        Returns:
          True if that took less than `timeout_s` seconds.
        """
        deadline = time.monotonic() + timeout_s
        given = not wait(list(self._storing), timeout_s).not_done
        while self.pool.stats()["waiting"]:
            if time.monotonic() > deadline:
                return False
            time.sleep(0.001)
        return given

    def close(self) -> None:
        """Ends the threads; stores and lookups under way are finished."""
        self._threads.shutdown()
