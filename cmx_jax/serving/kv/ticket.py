"""The ticket for fetching a prompt's pages; as JSON it is vLLM's `kv_transfer_params`."""

import secrets
import zlib
from dataclasses import asdict, dataclass
from typing import Any

import jax
import numpy as np

from cmx_jax.errors import CmxError
from cmx_jax.serving.ems.keys import Fingerprint

KvTransferParams = dict[str, Any]
"""A ticket as a JSON object."""


@dataclass(frozen=True, kw_only=True)
class Ticket:
    """Pages of one prompt that wait to be fetched.

    Attributes:
      transfer_id: Id of 63 random bits; never used twice.
      backend: Name of the transport.
      address: Address on which the sender's transport listens.
      fingerprint: Fingerprint of the instance that computed the pages.
      arrays: Shape and dtype of each array of the pages' tree: one array, or INT8 rows and their scales.
      checksums: CRC-32 of each page.
      lease_s: Seconds for which the pages are kept, counted from the offer or from the last heartbeat.
    """

    transfer_id: int
    backend: str
    address: str
    fingerprint: Fingerprint
    arrays: tuple[tuple[tuple[int, ...], str], ...]
    checksums: tuple[int, ...]
    lease_s: float

    def as_dict(self) -> KvTransferParams:
        """Returns the ticket as a JSON object."""
        return asdict(self)

    @classmethod
    def from_dict(cls, document: Any) -> "Ticket":
        """Makes a ticket of the result of `as_dict`, also after a round trip through JSON.

        Raises:
          CmxError: The document is not a ticket.
        """
        try:
            page = tuple(int(n) for n in document["fingerprint"]["page"])
            return cls(
                transfer_id=int(document["transfer_id"]),
                backend=str(document["backend"]),
                address=str(document["address"]),
                fingerprint=Fingerprint(**{**document["fingerprint"], "page": page}),
                arrays=tuple(
                    (tuple(int(n) for n in shape), str(dtype)) for shape, dtype in document["arrays"]
                ),
                checksums=tuple(int(n) for n in document["checksums"]),
                lease_s=float(document["lease_s"]),
            )
        except (KeyError, TypeError, ValueError) as error:
            raise CmxError(f"kv_transfer_params are not a ticket ({type(error).__name__}: {error})") from None


def new_id() -> int:
    """Returns 63 random bits that are not all zero."""
    return secrets.randbits(63) or 1


def checksums(pages: Any) -> tuple[int, ...]:
    """Returns the CRC-32 of each page.

    Args:
      pages: Tree of arrays `[pages, L, W, C]`. A page's checksum runs over its slice of all arrays in turn.
    """
    leaves = [np.ascontiguousarray(leaf) for leaf in jax.tree.leaves(pages)]
    codes = []
    for n in range(len(leaves[0])):
        code = 0
        for leaf in leaves:
            code = zlib.crc32(leaf[n].view(np.uint8), code)
        codes.append(code)
    return tuple(codes)
