"""An instance that spans processes, on one host or many: JAX makes one mesh of all their devices.

    span(...)            in each process, before anything else: `jax.distributed`
    one deployment       made in each of them with the same options
    Leader(...)          in process 0, which serves; `Programs.tell` sends what it runs, with its host arrays
    follow(...)          in the others, until the leader ends

All processes must start the same programs in the same order, as collectives wait for all ranks: so process 0
decides, and the others run what it sends. A process that dies breaks the collectives of all: the leader's
step fails, its requests end with an error, and all processes have to be started again.
"""

import contextlib
import socket
import time
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from cmx_jax.errors import CmxError
from cmx_jax.serving.ems import frames
from cmx_jax.serving.executor.instance import Instance
from cmx_jax.serving.executor.programs import Op

JOIN_S = 120.0  # longest wait for the other processes
SEND_S = 30.0  # longest time to send or receive a frame
LIMIT = 1 << 34  # largest frame, bytes


@dataclass(frozen=True, kw_only=True)
class Span:
    """One of several processes.

    Attributes:
      coordinator: `HOST:PORT` of process 0, for JAX; the leader listens at the next port.
      processes: Number of processes.
      index: Index of this process; 0 leads.

    Raises:
      CmxError: The address is malformed, or the index is not one of two or more processes.
    """

    coordinator: str
    processes: int
    index: int

    def __post_init__(self) -> None:
        host, _, port = self.coordinator.rpartition(":")
        if not host or not port.isdecimal() or not 0 < int(port) < 2**16 - 1:
            raise CmxError(f"--distributed {self.coordinator!r}, expected HOST:PORT of process 0")
        if self.processes < 2 or not 0 <= self.index < self.processes:
            raise CmxError(
                f"process {self.index} of {self.processes}, expected two or more of them, numbered from 0"
            )

    @property
    def control(self) -> tuple[str, int]:
        """Address at which process 0 sends its operations to the others."""
        host, _, port = self.coordinator.rpartition(":")
        return host, int(port) + 1

    def start(self, ranks: int) -> None:
        """Joins the devices of all processes, `ranks` in total; to be called before JAX computes anything.

        Raises:
          CmxError: The ranks do not divide into the processes, JAX has started already, or another process
            does not join in time.
        """
        if ranks % self.processes:
            raise CmxError(f"{ranks} ranks do not divide into {self.processes} processes")
        try:
            jax.config.update("jax_num_cpu_devices", ranks // self.processes)
            jax.config.update("jax_cpu_collectives_implementation", "gloo")
            jax.distributed.initialize(
                self.coordinator, self.processes, self.index, initialization_timeout=round(JOIN_S)
            )
        except RuntimeError as error:
            raise CmxError(
                f"the {self.processes} processes did not come together at {self.coordinator}: {error}"
            ) from None
        if jax.device_count() != ranks:
            raise CmxError(f"the processes have {jax.device_count()} devices, expected {ranks}")


class Leader:
    """Process 0's connections to the others."""

    def __init__(self, span: Span, secret: str):
        """Waits until all processes have joined.

        Args:
          span: Span of the instance, with index 0.
          secret: Secret that all processes share.

        Raises:
          CmxError: The port is taken, or a process does not join in time.
        """
        self._peers: list[socket.socket] = []
        until = time.monotonic() + JOIN_S
        try:
            with socket.create_server(span.control) as server:
                while len(self._peers) < span.processes - 1:
                    server.settimeout(max(until - time.monotonic(), 0.01))
                    peer, _ = server.accept()
                    if frames.accept(peer, secret.encode(), SEND_S):
                        self._peers.append(peer)
                    else:
                        peer.close()
        except OSError as error:
            raise CmxError(
                f"{span.control[0]}:{span.control[1]}: the other processes did not join ({error})"
            ) from None

    def tell(self, op: Op, leaves: list[Any], flags: dict[str, bool]) -> None:
        """Sends an operation to all other processes (`Programs.tell`)."""
        arrays = [np.ascontiguousarray(leaf) for leaf in leaves]
        meta = {"op": op.value, "flags": flags, "arrays": [[str(a.dtype), a.shape] for a in arrays]}
        body = b"".join(a.tobytes() for a in arrays)
        for peer in self._peers:
            frames.send(peer, meta, body, SEND_S)

    def close(self) -> None:
        """Closes the connections, which ends the other processes."""
        for peer in self._peers:
            peer.close()


def follow(span: Span, secret: str, instance: Instance) -> None:
    """Runs what process 0 runs, until it ends.

    Raises:
      CmxError: Process 0 cannot be reached, or has another secret.
    """
    deadline = time.monotonic() + JOIN_S
    while True:
        try:
            peer = socket.create_connection(span.control, SEND_S)
            break
        except OSError as error:
            if time.monotonic() > deadline:
                raise CmxError(f"process 0 is not at {span.control[0]}:{span.control[1]} ({error})") from None
            time.sleep(0.2)
    with peer, contextlib.suppress(EOFError, ConnectionError):
        if not frames.join(peer, secret.encode(), SEND_S):
            raise CmxError("process 0 has another secret: give all the same --cluster-secret")
        while True:
            meta, body = _next(peer)
            instance.programs.follow(Op(meta["op"]), _arrays(meta["arrays"], body), meta["flags"])


def _next(peer: socket.socket) -> tuple[dict[str, Any], bytes]:
    """Waits for the next frame without a time limit, and returns it."""
    peer.settimeout(None)
    if not peer.recv(1, socket.MSG_PEEK):
        raise EOFError
    return frames.receive(peer, SEND_S, LIMIT)


def _arrays(shapes: list[Any], body: bytes) -> list[np.ndarray]:
    arrays, offset = [], 0
    for name, shape in shapes:
        dtype, count = np.dtype(name), int(np.prod(shape))
        arrays.append(np.frombuffer(body, dtype, count, offset).reshape(shape))
        offset += count * dtype.itemsize
    return arrays
