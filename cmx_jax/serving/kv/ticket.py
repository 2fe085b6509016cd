"""What a decode instance must know to fetch a prompt's pages; as JSON it is vLLM's `kv_transfer_params`."""

import secrets
import zlib
from dataclasses import asdict, dataclass
from typing import Any

import jax
import numpy as np

from cmx_jax.errors import CmxError
from cmx_jax.serving.ems.keys import Fingerprint


@dataclass(frozen=True, kw_only=True)
class Ticket:
    """Pages of one prompt that wait to be fetched.

    Attributes:
      transfer_id: 63 random bits; never used twice.
      backend: the transport's name.
      address: where it listens.
      fingerprint: of the instance that computed the pages.
      arrays: shape and type of each array of the pages' tree: one, or INT8 rows and their scales.
      checksums: CRC-32 of each page.
      lease_s: seconds for which the pages are kept, from the offer or the last heartbeat on.
    """

    transfer_id: int
    backend: str
    address: str
    fingerprint: Fingerprint
    arrays: tuple[tuple[tuple[int, ...], str], ...]
    checksums: tuple[int, ...]
    lease_s: float

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, given: Any) -> "Ticket":
        """Of `as_dict`, or what JSON made of it.

        Raises:
          CmxError: it is no ticket.
        """
        try:
            page = tuple(int(n) for n in given["fingerprint"]["page"])
            return cls(
                transfer_id=int(given["transfer_id"]),
                backend=str(given["backend"]),
                address=str(given["address"]),
                fingerprint=Fingerprint(**{**given["fingerprint"], "page": page}),
                arrays=tuple((tuple(int(n) for n in shape), str(dtype)) for shape, dtype in given["arrays"]),
                checksums=tuple(int(n) for n in given["checksums"]),
                lease_s=float(given["lease_s"]),
            )
        except (KeyError, TypeError, ValueError) as error:
            raise CmxError(f"kv_transfer_params are no ticket ({type(error).__name__}: {error})") from None


def new_id() -> int:
    """63 random bits, not zero."""
    return secrets.randbits(63) or 1


def checksums(pages: Any) -> tuple[int, ...]:
    """CRC-32 of each page `[L, W, C]` of a tree of arrays `[pages, L, W, C]`, all its arrays together."""
    leaves = [np.ascontiguousarray(leaf) for leaf in jax.tree.leaves(pages)]
    found = []
    for n in range(len(leaves[0])):
        code = 0
        for leaf in leaves:
            code = zlib.crc32(leaf[n].view(np.uint8), code)
        found.append(code)
    return tuple(found)
