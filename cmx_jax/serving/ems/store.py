"""What every backend of the caching pool does, and what a block is called there."""

import re
from typing import Any, NamedTuple, Protocol, runtime_checkable

from cmx_jax.errors import CmxError

KEY_BYTES = 32
NAMESPACE = re.compile(r"[a-z0-9][a-z0-9._-]{0,63}")

Name = tuple[str, bytes]  # namespace, key


class Hit(NamedTuple):
    """A block that was found.

    Attributes:
      payload: its bytes, verified.
      tier: where they lay: `dram`, `disk`, or the backend's name.
    """

    payload: bytes
    tier: str


@runtime_checkable
class Store(Protocol):
    """Blocks by namespace and key. Implementations may be called from several threads.

    Every method but `close` raises `CmxError` for a namespace or key that cannot be one, and `OSError` where
    the store cannot be reached: the pool counts that, and goes on without it.
    """

    def get(self, namespace: str, key: bytes) -> Hit | None:
        """The block, None if there is none or it is damaged."""

    def put(self, namespace: str, key: bytes, payload: bytes) -> bool:
        """Whether the block is there now; one that was there already stays as it is."""

    def exists(self, namespace: str, key: bytes) -> bool: ...

    def delete(self, namespace: str, key: bytes) -> bool:
        """Whether there was one."""

    def stats(self) -> dict[str, Any]:
        """Counters, and what is held now, as JSON can say it."""

    def close(self) -> None: ...


def named(namespace: str, key: bytes) -> Name:
    """The name of a block.

    Raises:
      CmxError: the namespace could not be a folder's name on every file system, or the key is not 32 bytes.
    """
    if not NAMESPACE.fullmatch(namespace):
        raise CmxError(
            f"namespace {namespace[:80]!r}, expected 1 to 64 of a-z 0-9 . _ - with a letter or digit first"
        )
    if len(key) != KEY_BYTES:
        raise CmxError(f"key of {len(key)} bytes, expected {KEY_BYTES}, as keys.chain makes them")
    return namespace, key
