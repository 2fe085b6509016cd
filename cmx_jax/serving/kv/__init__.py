"""Transfer of a prompt's pages from prefill to decode (section 4.3.3): tickets, leases and transports.

    prefill                                                        decode
    LeasedPages.offer(pages) -> Ticket  -- with the first token -> fetch(ticket, ...)
      the pages are kept under a lease                               1. compares the fingerprints
    LeasedPages.renew          <-- heartbeat, while it waits ---     2. pulls the pages, within a time limit
    LeasedPages.acknowledge    <-- the pages have arrived ------     3. verifies the checksum of each page
      the pages are freed

A watchdog frees pages that are not acknowledged before their lease ends. A later request for them gets an
error, never the pages of another prompt, because ids are random and never reused. Pages that cannot be
fetched are an error that gives the reason; the caller's policy decides whether the prompt is run again or the
request fails.
"""

from cmx_jax.serving.kv.fetch import RemotePages, TransferError, check_fingerprint, fetch, transfer_locally
from cmx_jax.serving.kv.leases import LeasedPages
from cmx_jax.serving.kv.ticket import KvTransferParams, Ticket, checksums, new_id
from cmx_jax.serving.kv.transport import JaxTransport, Local, Transport

__all__ = [
    "JaxTransport",
    "KvTransferParams",
    "LeasedPages",
    "Local",
    "RemotePages",
    "Ticket",
    "TransferError",
    "Transport",
    "check_fingerprint",
    "checksums",
    "fetch",
    "new_id",
    "transfer_locally",
]
