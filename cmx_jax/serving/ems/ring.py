"""Which server has a key (section 4.4.1): global consistent hashing."""

import hashlib
from bisect import bisect
from collections.abc import Iterable

from cmx_jax.errors import CmxError

VIRTUAL_NODES = 128  # points of each server: shares of keys differ by about 1 / sqrt(128)


class Ring:
    """Servers at points of a circle; a key belongs to the server whose point comes next.

    Points depend on a server's own name only, so one more beside `n` servers takes about `1 / (n + 1)` of the
    keys from all others, and no key moves between those.

    Raises:
      CmxError: there is no server, or one twice.
    """

    def __init__(self, servers: Iterable[str], virtual_nodes: int = VIRTUAL_NODES):
        names = list(servers)
        if not names or len(set(names)) < len(names):
            raise CmxError(f"servers {', '.join(names) or 'none'}, expected one or more different ones")
        points = [(_place(f"{name}#{i}".encode()), name) for name in names for i in range(virtual_nodes)]
        self._places, self._names = zip(*sorted(points), strict=True)

    def server(self, key: bytes) -> str:
        """The name of a key's server."""
        return self._names[bisect(self._places, _place(key)) % len(self._names)]


def _place(data: bytes) -> bytes:
    return hashlib.sha256(data).digest()
