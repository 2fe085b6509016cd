"""The workers of a router: which of them are healthy, and which has the least load."""

import asyncio
import contextlib
import logging
import time
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field, replace

from cmx_jax.errors import CmxError
from cmx_jax.serving.roles.messages import WorkerStatus
from cmx_jax.serving.roles.peer import Peer, PeerError
from cmx_jax.serving.service.counters import EngineCounters, InstanceLoad, WorkerLoad, sum_counters
from cmx_jax.serving.service.frontend import Unavailable

log = logging.getLogger(__name__)
POLL_S = 1.0
PATIENCE_S = 30.0  # for which a request waits if no worker of a kind is healthy
SILENCE_S = 10.0  # without a status after which a worker counts as hanging and its requests go elsewhere


@dataclass(eq=False)
class Member:
    """A worker, as the router knows it.

    Attributes:
      role: Role of the worker, `prefill` or `decode`.
      peer: Client of the worker.
      load: Number of tokens of the unfinished requests that this router has sent to the worker.
      status: Last status of the worker, or None if it does not answer.
      error: Reason why the worker gets no request, or "".
      last_answer: Time of the worker's last status answer, in seconds of `time.monotonic`.
    """

    role: str
    peer: Peer
    load: int = 0
    status: WorkerStatus | None = None
    error: str = "has not answered yet"
    last_answer: float = field(default_factory=time.monotonic)
    _limits: set[asyncio.Timeout] = field(default_factory=set)

    @contextlib.asynccontextmanager
    async def busy(self, tokens: int) -> AsyncIterator[Peer]:
        """Counts a request in the load while the worker has it. A worker that fails is marked as lost.

        Raises:
          PeerError: The worker hangs.
        """
        limit = asyncio.timeout(None)
        self.load += tokens
        try:
            async with limit:
                self._limits.add(limit)
                yield self.peer
        except TimeoutError:
            raise PeerError(f"{self.peer.url} hangs: no sign of it for {SILENCE_S:g} s") from None
        except PeerError as error:
            self.mark_lost(error)
            raise
        finally:
            self._limits.discard(limit)
            self.load -= tokens

    def mark_lost(self, error: CmxError) -> None:
        """Sends no request to the worker until it answers again."""
        self.status = None
        self.set_error(str(error))

    def set_error(self, error: str) -> None:
        """Sets and logs the reason why the worker gets no request; "" lets it have requests."""
        reason = error.removeprefix(self.peer.url).lstrip(": ")
        if reason != self.error:
            log.warning("%s worker %s %s", self.role, self.peer.url, reason or "serves")
        self.error = reason

    def check_silence(self) -> None:
        """Gives up all requests of the worker if it has not answered for `SILENCE_S` seconds."""
        if time.monotonic() - self.last_answer > SILENCE_S:
            for limit in self._limits:
                limit.reschedule(0)
            self._limits.clear()


class Members:
    """All workers of a router, which polls their status each second.

    Attributes:
      all: Every worker, prefill workers first.
      patience_s: Seconds for which a request waits if no worker of a kind is healthy.

    Raises:
      CmxError: There is no worker of a kind, or an address is invalid.
    """

    def __init__(
        self, prefill: Sequence[str], decode: Sequence[str], secret: str, patience_s: float | None = None
    ):
        """Starts with workers that have not answered yet.

        Args:
          prefill: URLs of the prefill workers.
          decode: URLs of the decode workers.
          secret: Secret that all processes share.
          patience_s: Seconds for which a request waits if no worker of a kind is healthy; None is
            `PATIENCE_S`.
        """
        if not prefill or not decode:
            raise CmxError("a router needs workers, expected at least one --prefill URL and one --decode URL")
        kinds = [("prefill", url) for url in prefill] + [("decode", url) for url in decode]
        self.all = [Member(role, Peer(url, secret)) for role, url in kinds]
        self.patience_s = PATIENCE_S if patience_s is None else patience_s
        self._poller: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Polls every worker once, then starts polling in the background."""
        await self.refresh()
        self._poller = asyncio.create_task(self._poll())

    async def close(self) -> None:
        """Stops polling and closes the connections."""
        if self._poller is not None:
            self._poller.cancel()
            await asyncio.gather(self._poller, return_exceptions=True)
        for member in self.all:
            await member.peer.close()

    async def least_loaded(self, role: str) -> Member:
        """Returns the healthy worker with the least load; waits for one if there is none.

        Raises:
          Unavailable: No worker became healthy within `patience_s` seconds.
        """
        deadline = time.monotonic() + self.patience_s
        while True:
            healthy = [m for m in self.all if m.role == role and not m.error]
            if healthy:
                return min(healthy, key=lambda m: m.load)
            if time.monotonic() > deadline:
                raise Unavailable(self.missing() or f"no worker can {role} now")
            await asyncio.sleep(POLL_S / 4)

    def missing(self) -> str:
        """Returns the role that no worker has at the moment and each worker's reason, or ""."""
        for role in ("prefill", "decode"):
            errors = {m.peer.url: m.error for m in self.all if m.role == role}
            if all(errors.values()):
                reasons = "; ".join(f"{url} {error}" for url, error in errors.items())
                return f"no worker can {role} now ({reasons})"
        return ""

    async def refresh(self) -> None:
        """Asks every worker for its status.

        A worker whose pages differ from those of most others is not used.
        """
        await asyncio.gather(*(self._ask(member) for member in self.all))
        present = [m for m in self.all if m.status is not None and m.status.role == m.role]
        fingerprints = Counter(str(m.status.fingerprint) for m in present if m.status)
        majority = fingerprints.most_common(1)[0][0] if fingerprints else ""
        reference = next((m for m in present if m.status and str(m.status.fingerprint) == majority), None)
        for member in self.all:
            if member.status is not None:
                member.set_error(_unfit(member, member.status, reference))

    async def _poll(self) -> None:
        while True:
            await asyncio.sleep(POLL_S)
            await self.refresh()

    async def _ask(self, member: Member) -> None:
        try:
            member.status, member.last_answer = await member.peer.status(), time.monotonic()
        except CmxError as error:
            member.mark_lost(error)
            member.check_silence()

    def workers(self) -> list[WorkerLoad]:
        """Returns the health and the load of each worker."""
        return [WorkerLoad(role=m.role, url=m.peer.url, load=m.load, error=m.error or None) for m in self.all]

    def counters(self) -> EngineCounters:
        """Returns counters and gauges, summed over the last status of each worker."""
        statuses = [m.status for m in self.all if m.status]
        instances = [instance for status in statuses for instance in status.instances]
        used, pages = sum(i.pages_used for i in instances), sum(i.pages for i in instances)
        return sum_counters((status.counters for status in statuses), used / pages if pages else 0.0)

    def instances(self) -> list[InstanceLoad]:
        """Returns the load of all workers' instances, numbering their NPUs one worker after the other."""
        rows: list[InstanceLoad] = []
        for member in self.all:
            for instance in member.status.instances if member.status else ():
                first_npu = rows[-1].first_npu + rows[-1].npus if rows else 0
                name = f"{instance.name} at {member.peer.url}"
                rows.append(replace(instance, name=name, first_npu=first_npu))
        return rows


def _unfit(member: Member, status: WorkerStatus, reference: Member | None) -> str:
    """Returns the reason not to use a worker, or "".

    If its pages differ from those of `reference`, the reason shows both values of each difference.
    """
    if status.role != member.role:
        return f"is a {status.role} worker, expected one that can {member.role}"
    if status.broken or status.draining:
        return status.broken or "is shutting down"
    if reference is None or reference.status is None:
        return ""
    ours, theirs = status.fingerprint, reference.status.fingerprint
    different = (name for name in ours if ours[name] != theirs.get(name))
    return "; ".join(
        f"has {name} {ours[name]!r}, {reference.peer.url} {theirs.get(name)!r}" for name in different
    )
