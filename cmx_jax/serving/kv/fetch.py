"""The receiving end: compare, pull in time, verify."""

import threading
from dataclasses import asdict
from typing import Any

import jax

from cmx_jax.errors import CmxError
from cmx_jax.serving.ems.keys import Fingerprint
from cmx_jax.serving.kv.ticket import Ticket, checksums
from cmx_jax.serving.kv.transport import TIMEOUT_S, Transport


class TransferError(CmxError):
    """Pages could not be fetched, or are not what was sent."""


def check_fingerprint(ours: Fingerprint, theirs: Fingerprint) -> None:
    """The handshake: pages of one side mean the same on the other.

    Raises:
      TransferError: they do not; shows both sides of each difference.
    """
    mine, other = asdict(ours), asdict(theirs)
    differences = [
        f"{name} is {mine[name]!r} here and {other[name]!r} there"
        for name in mine
        if mine[name] != other[name]
    ]
    if differences:
        raise TransferError(
            f"the instances' pages do not fit together: {'; '.join(differences)}: start both with the same "
            "model, page width, dtype, kv_cache_dtype and num_speculative_tokens"
        )


def fetch(
    ticket: Ticket, transport: Transport, ours: Fingerprint, tree: Any, timeout_s: float = TIMEOUT_S
) -> Any:
    """A prompt's pages.

    Args:
      ticket: as it was offered.
      transport: of this process; of the ticket's backend.
      ours: the fingerprint of the instance that will have them.
      tree: the structure of a cache's pages (`jax.tree.structure`).
      timeout_s: seconds after which it is given up; the pull itself may go on, and is left alone then.

    Returns:
      `[pages, L, W, C]`, on the host.

    Raises:
      TransferError: fingerprints differ, nothing came in time, or what came is damaged.
    """
    check_fingerprint(ours, ticket.fingerprint)
    if ticket.backend != transport.name:
        raise TransferError(
            f"the pages are offered over {ticket.backend!r} and fetched over {transport.name!r}: start both "
            "sides with the same transport"
        )
    arrays = _in_time(ticket, transport, timeout_s)
    if checksums(arrays) != ticket.checksums:
        raise TransferError("the pages came damaged: their checksums are not those of the ticket")
    return jax.tree.unflatten(tree, arrays)


def _in_time(ticket: Ticket, transport: Transport, timeout_s: float) -> list[Any]:
    found: list[Any] = []

    def pull() -> None:
        try:
            found.append(transport.pull(ticket.address, ticket.transfer_id, ticket.arrays))
        except Exception as error:
            found.append(error)

    thread = threading.Thread(target=pull, name="kv-pull", daemon=True)
    thread.start()
    thread.join(timeout_s)
    if not found:
        raise TransferError(f"{ticket.address} sent no pages within {timeout_s:g} s")
    if isinstance(found[0], Exception):
        kind = type(found[0]).__name__
        raise TransferError(f"{ticket.address} has not sent the pages ({kind}: {found[0]})") from found[0]
    return list(found[0])
