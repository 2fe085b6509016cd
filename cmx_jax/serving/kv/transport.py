"""Transports that carry pages: between instances of one process, or between processes through JAX."""

import contextlib
import threading
import time
from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np

TIMEOUT_S = 10.0
Arrays = Sequence[tuple[tuple[int, ...], str]]  # shape and dtype of each array


@runtime_checkable
class Transport(Protocol):
    """Carries arrays by transfer id. Arrays of an id are pulled at most once, or withdrawn.

    Attributes:
      name: Name of the backend, as written in tickets.
      address: Address from which other instances pull.
    """

    name: str
    address: str

    def publish(self, transfer_id: int, arrays: list[Any]) -> None:
        """Lets arrays be pulled."""

    def withdraw(self, transfer_id: int) -> None:
        """Frees arrays that will not be pulled; does nothing for arrays that were pulled already."""

    def taken(self, transfer_id: int) -> None:
        """Records that arrays were pulled, so that there is nothing to withdraw."""

    def pull(self, address: str, transfer_id: int, arrays: Arrays) -> list[np.ndarray]:
        """Fetches arrays.

        Raises:
          Exception: The arrays are not there or did not arrive within `TIMEOUT_S`, or the sender cannot be
            reached. Waiting for an unreachable sender may take for ever.
        """

    def close(self) -> None:
        """Frees all arrays that were not pulled."""


class Local:
    """Transport between instances of one process: it hands over the arrays themselves."""

    name, address = "local", "here"

    def __init__(self) -> None:
        self._held: dict[int, list[Any]] = {}
        self._lock = threading.Lock()

    def publish(self, transfer_id: int, arrays: list[Any]) -> None:
        with self._lock:
            self._held[transfer_id] = arrays

    def withdraw(self, transfer_id: int) -> None:
        with self._lock:
            self._held.pop(transfer_id, None)

    taken = withdraw

    def pull(self, address: str, transfer_id: int, arrays: Arrays) -> list[np.ndarray]:
        del address, arrays
        with self._lock:
            return self._held.pop(transfer_id)

    def close(self) -> None:
        with self._lock:
            self._held.clear()


class JaxTransport:
    """Transport between processes, with `jax.experimental.transfer`.

    Pulling from a dead peer raises an error. Arrays that a peer does not have never arrive, without an error.
    Connecting to a peer that hangs takes for ever, so the caller needs a time limit of its own (`fetch` has
    one).
    """

    name = "jax"

    def __init__(self, host: str = "127.0.0.1"):
        """Starts a transfer server.

        Args:
          host: Address of this machine under which other processes reach it.
        """
        from jax.experimental import transfer

        listen = f"{host}:0"
        self._device = jax.local_devices()[0]
        self._server = transfer.start_transfer_server(self._device.client, listen, [listen])
        self.address = self._server.address()
        self._peers: dict[str, Any] = {}
        self._published: dict[int, Arrays] = {}
        self._lock = threading.Lock()

    def publish(self, transfer_id: int, arrays: list[Any]) -> None:
        on_device = [jax.device_put(array, self._device) for array in arrays]
        with self._lock:
            self._published[transfer_id] = [(tuple(a.shape), str(a.dtype)) for a in on_device]
        self._server.await_pull(transfer_id, on_device)

    def withdraw(self, transfer_id: int) -> None:
        """Frees arrays by pulling them itself, as the server has no other way to forget an offer.

        The answer is not awaited: if the arrays were pulled already, it never arrives.
        """
        with self._lock:
            arrays = self._published.pop(transfer_id, None)
        if arrays is not None:
            with contextlib.suppress(Exception):  # the server ends
                self._start_pull(self.address, transfer_id, arrays)

    def pull(self, address: str, transfer_id: int, arrays: Arrays) -> list[np.ndarray]:
        deadline, pause = time.monotonic() + TIMEOUT_S, 1e-4
        try:
            pending: list[Any] = self._start_pull(address, transfer_id, arrays)
            while not all(array.is_ready() for array in pending):
                if time.monotonic() > deadline:
                    raise TimeoutError(f"nothing came within {TIMEOUT_S:g} s")
                time.sleep(pause)
                pause = min(2 * pause, 0.01)
            return [np.asarray(array) for array in pending]
        except Exception:
            self._peers.pop(address, None)  # the next pull connects again
            raise

    def _start_pull(self, address: str, transfer_id: int, arrays: Arrays) -> list[jax.Array]:
        """Requests arrays; the returned ones may not have arrived yet."""
        peer = self._peers.get(address)
        if peer is None:  # without the lock: connecting to a peer that hangs takes for ever
            peer = self._peers[address] = self._server.connect(address)
        one = jax.sharding.SingleDeviceSharding(self._device)
        shapes = [jax.ShapeDtypeStruct(shape, jnp.dtype(dtype), sharding=one) for shape, dtype in arrays]
        return peer.pull(transfer_id, shapes)

    def taken(self, transfer_id: int) -> None:
        with self._lock:
            self._published.pop(transfer_id, None)

    def close(self) -> None:
        with self._lock:
            transfer_ids = list(self._published)
        for transfer_id in transfer_ids:
            self.withdraw(transfer_id)
