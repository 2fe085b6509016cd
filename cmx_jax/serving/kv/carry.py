"""Pages between the instances of an engine, and those that came from another process."""

from collections.abc import Sequence
from typing import Any

import jax

from cmx_jax.serving.kv.fetch import TransferError, fetch
from cmx_jax.serving.kv.outbox import Outbox


def carry(outbox: Outbox, pages: Any) -> Any:
    """Offers pages and fetches them, as two instances of one process do.

    Raises:
      TransferError: they did not come, or are damaged.
    """
    ticket = outbox.offer(pages)
    try:
        found = fetch(ticket, outbox.transport, outbox.fingerprint, jax.tree.structure(pages))
    except TransferError:
        outbox.withdraw(ticket.transfer_id)
        raise
    outbox.acknowledge(ticket.transfer_id)
    return found


class Parcel:
    """Pages that were fetched already: to whoever moves them it is the instance that has them."""

    name = "another process"

    def __init__(self, pages: Any):
        self._pages = pages

    def take_pages(self, requests: Sequence[Any], receivers: Sequence[int], ranks: int) -> list[Any]:
        """Of its one request."""
        del requests, receivers, ranks
        return [self._pages]

    def release(self, request: Any) -> None:
        """There is nothing to give back."""
