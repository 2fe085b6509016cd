"""What was prefilled and waits to be fetched: under leases, which a watchdog ends."""

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


class Outbox:
    """Pages by ticket. Methods may be called from several threads.

    * What is offered is acknowledged, withdrawn, or expires: then it is freed.
    * An id that is gone stays unknown.

    Attributes:
      counts: `offered`, `acknowledged`, `withdrawn`, `expired`.
    """

    def __init__(
        self,
        transport: Transport,
        fingerprint: Fingerprint,
        lease_s: float = LEASE_S,
        clock: Callable[[], float] = time.monotonic,
    ):
        """Args:
          transport: what carries the pages.
          fingerprint: of the instances that compute them.
          lease_s: seconds for which they are kept without a heartbeat.
          clock: seconds.

        Raises:
          CmxError: a lease is not above zero.
        """
        if not lease_s > 0:
            raise CmxError(f"a lease of {lease_s} seconds, expected more than zero")
        self.transport, self.fingerprint, self.lease_s, self._clock = transport, fingerprint, lease_s, clock
        self.counts: Counter[str] = Counter()
        self._until: dict[int, float] = {}
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._watchdog: threading.Thread | None = None

    def offer(self, pages: Any, transfer_id: int = 0) -> Ticket:
        """Keeps pages `[pages, L, W, C]` (a tree of arrays) until somebody has them; under an id that was
        never used before, or 0: a new one."""
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
            self._until[ticket.transfer_id] = self._clock() + self.lease_s
            self.counts["offered"] += 1
        self.transport.publish(ticket.transfer_id, leaves)
        return ticket

    @property
    def waiting(self) -> int:
        """Offers that nobody has acknowledged."""
        return len(self._until)

    def renew(self, transfer_id: int) -> bool:
        """The heartbeat of whoever will fetch it: the lease begins anew. False: it is gone."""
        with self._lock:
            if transfer_id not in self._until:
                return False
            self._until[transfer_id] = self._clock() + self.lease_s
            return True

    def acknowledge(self, transfer_id: int) -> bool:
        """Somebody has the pages; True the first time."""
        if not self._forget(transfer_id, "acknowledged"):
            return False
        self.transport.taken(transfer_id)
        return True

    def withdraw(self, transfer_id: int) -> bool:
        """Nobody wants the pages any more; True if they were here."""
        if not self._forget(transfer_id, "withdrawn"):
            return False
        self.transport.withdraw(transfer_id)
        return True

    def sweep(self) -> list[int]:
        """Frees what nobody fetched in time; returns its ids."""
        now = self._clock()
        late = [transfer_id for transfer_id, until in list(self._until.items()) if until <= now]
        gone = [transfer_id for transfer_id in late if self._forget(transfer_id, "expired")]
        for transfer_id in gone:
            self.transport.withdraw(transfer_id)
        return gone

    def watch(self, every_s: float = 1.0) -> None:
        """Starts the watchdog, a thread that sweeps."""

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

    def _forget(self, transfer_id: int, why: str) -> bool:
        with self._lock:
            if self._until.pop(transfer_id, None) is None:
                return False
            self.counts[why] += 1
            return True
