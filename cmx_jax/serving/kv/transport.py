"""What carries pages: between instances of one process, or between processes through JAX."""

import contextlib
import threading
import time
from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np

TIMEOUT_S = 10.0
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
          Exception: they are not there, or did not come within `TIMEOUT_S`, or who has them cannot be
            reached. That may take for ever.
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
    """Between processes, with `jax.experimental.transfer`. A peer that is dead is an error; what one does not
    have never comes, without an error. To connect to one that hangs takes for ever, so that a caller needs a
    limit of his own (`fetch` has it)."""

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
        """The server has no way to forget what it offers, but to be asked for it. Nobody waits for the
        answer: if somebody has pulled the arrays already, it never comes."""
        with self._lock:
            arrays = self._published.pop(transfer_id, None)
        if arrays is not None:
            with contextlib.suppress(Exception):  # the server ends
                self._asked(self.address, transfer_id, arrays)

    def pull(self, address: str, transfer_id: int, arrays: Arrays) -> list[np.ndarray]:
        until, pause = time.monotonic() + TIMEOUT_S, 1e-4
        try:
            coming = self._asked(address, transfer_id, arrays)
            while not all(array.is_ready() for array in coming):
                if time.monotonic() > until:
                    raise TimeoutError(f"nothing came within {TIMEOUT_S:g} s")
                time.sleep(pause)
                pause = min(2 * pause, 0.01)
            return [np.asarray(array) for array in coming]
        except Exception:
            self._peers.pop(address, None)  # the next one connects anew
            raise

    def _asked(self, address: str, transfer_id: int, arrays: Arrays) -> list[jax.Array]:
        """Arrays that may not be here yet."""
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
            left = list(self._published)
        for transfer_id in left:
            self.withdraw(transfer_id)
