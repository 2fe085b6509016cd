"""Context caching (section 4.4.2): prompts' rows as blocks in the caching pool.

A block is `block` tokens of all layers, whole pages as an instance keeps them, under a key that is a chain
of hashes over all tokens up to its end: equal beginnings have equal keys, whoever computed them. The chain's
root is a fingerprint of all that the bytes depend on, and of the tenant. Blocks are written once and never
changed.

The MTP layer's row of a block's last token was computed with the token that followed it when the block was
stored. Another one may follow now; that makes a draft worse at times, and changes no text, as drafts are
verified.
"""

import hashlib
import logging
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import replace
from typing import Any, Protocol, runtime_checkable

import jax
import numpy as np

from cmx_jax.errors import CmxError
from cmx_jax.serving.ems.keys import Fingerprint, chain, root

log = logging.getLogger(__name__)


def space(namespace: str) -> str:
    """A namespace as the pool has it: any text of a client becomes a name that every backend takes."""
    return f"t-{hashlib.sha256(namespace.encode()).hexdigest()[:32]}" if namespace else "default"


@runtime_checkable
class BlockPool(Protocol):
    """What of `cmx_jax.serving.ems.Pool` is used here."""

    def get_many(self, namespace: str, keys: Sequence[bytes]) -> list[bytes]: ...

    def put_async(self, namespace: str, key: bytes, payload: bytes) -> Any: ...

    def stats(self) -> dict[str, Any]: ...


class ContextCache:
    """Blocks of pages of one layout in a pool.

    Attributes:
      pool: where the bytes are.
      block: tokens of a block.
      generated: whether what was generated is stored, too (section 4.4.2: not of reasoning models, whose next
        turn leaves the thinking out).
      hits, queries: tokens found, and asked for.
      errors: lookups and stores that the pool answered with an error; they are misses, and are logged.
    """

    def __init__(self, pool: BlockPool, fingerprint: Fingerprint, pages: Any, generated: bool = False):
        """Reads and writes blocks of an instance's pages.

        Args:
          pool: the caching pool.
          fingerprint: of the instance; its tenant is replaced by a request's namespace.
          pages: arrays or shapes `[P, L, W, C]` of its cache.
          generated: see above.

        Raises:
          CmxError: blocks are not whole pages.
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
        self.hits = self.queries = self.errors = 0

    def keys(self, tokens: Sequence[int], namespace: str) -> list[bytes]:
        """Of all full blocks, in order."""
        return chain(root(replace(self._fingerprint, tenant=namespace)), tokens, self.block)

    def lookup(self, tokens: Sequence[int], namespace: str) -> "Future[list[Any]]":
        """Fetches the longest beginning that is there, in the background; one token at least is left to run.

        Returns:
          Of each block its pages.
        """
        most = (len(tokens) - 1) // self.block
        self.queries += len(tokens)
        return self._threads.submit(self._fetch, list(tokens[: most * self.block]), namespace)

    def _fetch(self, tokens: Sequence[int], namespace: str) -> list[Any]:
        found: list[Any] = []
        try:
            for payload in self.pool.get_many(space(namespace), self.keys(tokens, namespace)):
                if len(payload) != sum(self._sizes):
                    break
                found.append(self._opened(payload))
        except Exception:
            self._failed()
        return found

    def _opened(self, payload: bytes) -> Any:
        leaves, at = [], 0
        for (shape, dtype), size in zip(self._leaves, self._sizes, strict=True):
            leaves.append(np.frombuffer(payload, dtype, int(np.prod(shape)), at).reshape(shape))
            at += size
        return jax.tree.unflatten(self._tree, leaves)

    def store(self, tokens: Sequence[int], namespace: str, pages: Any, known: int = 0) -> None:
        """Stores the full blocks of a sequence in the background.

        Args:
          tokens: whose rows the pages hold, from the first on.
          namespace: whose they are.
          pages: `[pages, L, W, C]`, on the host.
          known: leading blocks that the pool has.
        """
        count = len(tokens) // self.block
        if count > known:
            whole = list(tokens[: count * self.block])
            future = self._threads.submit(self._put, whole, namespace, pages, known)
            self._storing.add(future)
            future.add_done_callback(self._storing.discard)

    def _put(self, tokens: Sequence[int], namespace: str, pages: Any, known: int) -> None:
        keys, leaves = self.keys(tokens, namespace), jax.tree.leaves(pages)
        try:
            for i in range(known, len(keys)):
                here = slice(i * self._pages, (i + 1) * self._pages)
                payload = b"".join(leaf[here].tobytes() for leaf in leaves)
                self.pool.put_async(space(namespace), keys[i], payload)
        except Exception:
            self._failed()

    def _failed(self) -> None:
        self.errors += 1
        log.exception("the caching pool failed")

    def joined(self, blocks: list[Any]) -> Any:
        """Blocks' pages as one."""
        return jax.tree.map(lambda *parts: np.concatenate(parts), *blocks)

    def stats(self) -> dict[str, Any]:
        """The pool's, and how many lookups and stores it failed."""
        return {**self.pool.stats(), "errors": self.errors}

    def settle(self, timeout_s: float = 10.0) -> bool:
        """Waits until the pool was given all that is to be stored; whether that was in time."""
        return not wait(list(self._storing), timeout_s).not_done

    def close(self) -> None:
        """Ends the threads; what is under way is finished."""
        self._threads.shutdown()
