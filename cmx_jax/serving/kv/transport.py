"""What carries pages: between instances of one process, or between processes through JAX."""

import contextlib
import threading
from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np

Arrays = Sequence[tuple[tuple[int, ...], str]]  # shapes and types


@runtime_checkable
class Transport(Protocol):
    """Carries arrays by id. Each is pulled at most once, or withdrawn.

    Attributes:
      name: of the backend, as tickets have it.
      address: where others pull from.
    """

    name: str
    address: str

    def publish(self, transfer_id: int, arrays: list[Any]) -> None:
        """Lets arrays be pulled."""

    def withdraw(self, transfer_id: int) -> None:
        """Frees arrays that nobody will pull; those that were pulled already are no concern."""

    def taken(self, transfer_id: int) -> None:
        """Notes that arrays were pulled: there is nothing to withdraw."""

    def pull(self, address: str, transfer_id: int, arrays: Arrays) -> list[np.ndarray]:
        """Fetches arrays.

        Raises:
          Exception: they are not there, or who has them cannot be reached. It may take for ever.
        """

    def close(self) -> None:
        """Frees what is left."""


class Local:
    """Between instances of one process: the arrays themselves change hands."""

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
    """Between processes, with `jax.experimental.transfer`. A peer that is dead is an error; one that hangs is
    waited for without limit, so that a caller needs a limit of his own (`fetch` has it)."""

    name = "jax"

    def __init__(self, host: str = "127.0.0.1"):
        """Args:
        host: the address of this machine under which others reach it.
        """
        from jax.experimental import transfer

        here = f"{host}:0"
        self._device = jax.local_devices()[0]
        self._server = transfer.start_transfer_server(self._device.client, here, [here])
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
        """The server has no way to forget what it offers, but to be asked for it."""
        with self._lock:
            arrays = self._published.pop(transfer_id, None)
        if arrays is not None:
            with contextlib.suppress(Exception):  # it was pulled a moment ago
                self.pull(self.address, transfer_id, arrays)

    def pull(self, address: str, transfer_id: int, arrays: Arrays) -> list[np.ndarray]:
        peer = self._peers.get(address)
        if peer is None:  # without the lock: connecting to a peer that hangs takes for ever
            peer = self._peers[address] = self._server.connect(address)
        one = jax.sharding.SingleDeviceSharding(self._device)
        shapes = [jax.ShapeDtypeStruct(shape, jnp.dtype(dtype), sharding=one) for shape, dtype in arrays]
        try:
            return [np.asarray(array) for array in peer.pull(transfer_id, shapes)]
        except Exception:
            self._peers.pop(address, None)  # the next one connects anew
            raise

    def taken(self, transfer_id: int) -> None:
        with self._lock:
            self._published.pop(transfer_id, None)

    def close(self) -> None:
        with self._lock:
            left = list(self._published)
        for transfer_id in left:
            self.withdraw(transfer_id)
