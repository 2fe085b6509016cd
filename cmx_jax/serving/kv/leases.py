"""The sending end of a page transfer: prefilled pages, each kept under a lease until it is fetched."""

import threading
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from cmx_jax.errors import CmxError
from cmx_jax.serving.ems.keys import Fingerprint
from cmx_jax.serving.kv.ticket import Ticket, checksums, new_id
from cmx_jax.serving.kv.transport import Transport

LEASE_S = 30.0


class LeasedPages:
    """Pages by ticket. Methods may be called from several threads.

    * Offered pages are freed when they are acknowledged or withdrawn, or when their lease expires.
    * An id whose pages were freed stays unknown.

    Attributes:
      counts: Number of transfers `offered`, `acknowledged`, `withdrawn` and `expired`.
    """

    def __init__(
        self,
        transport: Transport,
        fingerprint: Fingerprint,
        lease_s: float = LEASE_S,
        clock: Callable[[], float] = time.monotonic,
    ):
        """Starts without pages.

        Args:
          transport: Transport that sends the pages.
          fingerprint: Fingerprint of the instances that compute the pages.
          lease_s: Seconds for which pages are kept without a heartbeat.
          clock: Function that returns the time in seconds.

        Raises:
          CmxError: `lease_s` is not above zero.
        """
        if not lease_s > 0:
            raise CmxError(f"a lease of {lease_s} seconds, expected more than zero")
        self.transport, self.fingerprint, self.lease_s, self._clock = transport, fingerprint, lease_s, clock
        self.counts: Counter[str] = Counter()
        self._deadlines: dict[int, float] = {}  # end of each lease, by transfer id
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._watchdog: threading.Thread | None = None

    def offer(self, pages: Any, transfer_id: int = 0) -> Ticket:
        """Keeps pages until they are fetched, under a lease.

        Args:
          pages: Tree of arrays `[pages, L, W, C]`.
          transfer_id: Id that was never used before, or 0 to draw a new one.

        Returns:
          Ticket with which the pages can be fetched.
        """
        leaves = [np.ascontiguousarray(leaf) for leaf in jax.tree.leaves(pages)]
        ticket = Ticket(
            transfer_id=transfer_id or new_id(),
            backend=self.transport.name,
            address=self.transport.address,
            fingerprint=self.fingerprint,
            arrays=tuple((leaf.shape, str(leaf.dtype)) for leaf in leaves),
            checksums=checksums(leaves),
            lease_s=self.lease_s,
        )
        with self._lock:
            self._deadlines[ticket.transfer_id] = self._clock() + self.lease_s
            self.counts["offered"] += 1
        self.transport.publish(ticket.transfer_id, leaves)
        return ticket

    @property
    def waiting(self) -> int:
        """Number of offers that are not acknowledged yet."""
        return len(self._deadlines)

    def renew(self, transfer_id: int) -> bool:
        """Renews the lease. Returns False if the pages are no longer held."""
        with self._lock:
            if transfer_id not in self._deadlines:
                return False
            self._deadlines[transfer_id] = self._clock() + self.lease_s
            return True

    def acknowledge(self, transfer_id: int) -> bool:
        """Frees pages that have arrived. Returns True the first time."""
        if not self._forget(transfer_id, "acknowledged"):
            return False
        self.transport.taken(transfer_id)
        return True

    def withdraw(self, transfer_id: int) -> bool:
        """Drops the pages. Returns whether they were held."""
        if not self._forget(transfer_id, "withdrawn"):
            return False
        self.transport.withdraw(transfer_id)
        return True

    def sweep(self) -> list[int]:
        """Frees pages whose lease has ended. Returns their transfer ids."""
        now = self._clock()
        late = [transfer_id for transfer_id, deadline in list(self._deadlines.items()) if deadline <= now]
        expired = [transfer_id for transfer_id in late if self._forget(transfer_id, "expired")]
        for transfer_id in expired:
            self.transport.withdraw(transfer_id)
        return expired

    def watch(self, every_s: float = 1.0) -> None:
        """Starts the watchdog, a thread that calls `sweep` every `every_s` seconds."""

        def run() -> None:
            while not self._stop.wait(every_s):
                self.sweep()

        self._watchdog = threading.Thread(target=run, name="kv-watchdog", daemon=True)
        self._watchdog.start()

    def close(self) -> None:
        """Ends the watchdog and frees everything."""
        self._stop.set()
        if self._watchdog is not None:
            self._watchdog.join()
        self.transport.close()

    def _forget(self, transfer_id: int, outcome: str) -> bool:
        with self._lock:
            if self._deadlines.pop(transfer_id, None) is None:
                return False
            self.counts[outcome] += 1
            return True
