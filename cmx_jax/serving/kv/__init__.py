"""Prompts' pages on their way from prefill to decode (section 4.3.3): tickets, leases, and what carries them.

    prefill                                                        decode
    Outbox.offer(pages) -> Ticket  --- with the first token --->   fetch(ticket, ...)
      the pages are kept under a lease                               1. fingerprints are compared
    Outbox.renew          <--- heartbeat, while it waits ---         2. the transport pulls the pages, in time
    Outbox.acknowledge    <--- the pages are mine ----------         3. each page's checksum is verified
      the pages are freed

What is not acknowledged before its lease ends is freed by a watchdog; whoever asks for it then gets an
error, not somebody else's pages, as ids are random and never used again. What cannot be fetched is an error
that says why; whether the prompt is run again or the request fails is the caller's policy.
"""

from cmx_jax.serving.kv.carry import Parcel, carry
from cmx_jax.serving.kv.fetch import TransferError, check_fingerprint, fetch
from cmx_jax.serving.kv.outbox import Outbox
from cmx_jax.serving.kv.ticket import Ticket, checksums, new_id
from cmx_jax.serving.kv.transport import JaxTransport, Local, Transport

__all__ = [
    "JaxTransport",
    "Local",
    "Outbox",
    "Parcel",
    "Ticket",
    "TransferError",
    "Transport",
    "carry",
    "check_fingerprint",
    "checksums",
    "fetch",
    "new_id",
]
