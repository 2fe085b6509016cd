"""The receiving end of a page transfer: fingerprints, time limit, checksums."""

import threading
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import jax

from cmx_jax.errors import CmxError
from cmx_jax.serving.ems.keys import Fingerprint
from cmx_jax.serving.kv.leases import LeasedPages
from cmx_jax.serving.kv.ticket import Ticket, checksums
from cmx_jax.serving.kv.transport import TIMEOUT_S, Transport


class TransferError(CmxError):
    """Pages could not be fetched, or differ from what was sent."""


class RemotePages:
    """Pages that were already fetched from another process, with the interface of a sending instance.

    The code that moves pages between instances treats this object as the instance that prefilled them.
    """

    name = "another process"

    def __init__(self, pages: Any):
        self._pages = pages

    def take_pages(self, requests: Sequence[Any], receivers: Sequence[int], ranks: int) -> list[Any]:
        """Returns the pages of the single request that this object stands for."""
        del requests, receivers, ranks
        return [self._pages]

    def release(self, request: Any) -> None:
        """Does nothing: the sending process frees its own pages."""


def check_fingerprint(ours: Fingerprint, theirs: Fingerprint) -> None:
    """Checks that pages mean the same on both sides of a transfer.

    Raises:
      TransferError: The fingerprints differ; the message shows both values of each difference.
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
    """Fetches the pages of a prompt.

    Args:
      ticket: Ticket that the sender returned.
      transport: Transport of this process, with the same backend as the ticket's.
      ours: Fingerprint of the instance that receives the pages.
      tree: Structure of a cache's pages (`jax.tree.structure`).
      timeout_s: Time limit in seconds. A pull that takes longer is abandoned; its thread may go on.

    Returns:
      Pages `[pages, L, W, C]`, on the host.

    Raises:
      TransferError: The fingerprints or backends differ, nothing arrived in time, or the pages are damaged.
    """
    check_fingerprint(ours, ticket.fingerprint)
    if ticket.backend != transport.name:
        raise TransferError(
            f"the pages are offered over {ticket.backend!r} and fetched over {transport.name!r}: start both "
            "sides with the same transport"
        )
    arrays = _pull_in_time(ticket, transport, timeout_s)
    if checksums(arrays) != ticket.checksums:
        raise TransferError("the pages came damaged: their checksums are not those of the ticket")
    return jax.tree.unflatten(tree, arrays)


def transfer_locally(leased: LeasedPages, pages: Any) -> Any:
    """Offers pages and fetches them, for two instances of one process.

    Raises:
      TransferError: The pages did not arrive, or are damaged.
    """
    ticket = leased.offer(pages)
    try:
        fetched = fetch(ticket, leased.transport, leased.fingerprint, jax.tree.structure(pages))
    except TransferError:
        leased.withdraw(ticket.transfer_id)
        raise
    leased.acknowledge(ticket.transfer_id)
    return fetched


def _pull_in_time(ticket: Ticket, transport: Transport, timeout_s: float) -> list[Any]:
    results: list[Any] = []  # one entry: the arrays, or the exception

    def pull() -> None:
        try:
            results.append(transport.pull(ticket.address, ticket.transfer_id, ticket.arrays))
        except Exception as error:
            results.append(error)

    thread = threading.Thread(target=pull, name="kv-pull", daemon=True)
    thread.start()
    thread.join(timeout_s)
    if not results:
        raise TransferError(f"{ticket.address} sent no pages within {timeout_s:g} s")
    if isinstance(results[0], Exception):
        kind = type(results[0]).__name__
        raise TransferError(f"{ticket.address} has not sent the pages ({kind}: {results[0]})") from results[0]
    return list(results[0])
