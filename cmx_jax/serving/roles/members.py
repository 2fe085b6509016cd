"""The workers that a router has: who is well, who has the least to do."""

import asyncio
import contextlib
import logging
import time
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from cmx_jax.errors import CmxError
from cmx_jax.serving.roles.messages import WorkerStatus
from cmx_jax.serving.roles.peer import Peer, PeerError
from cmx_jax.serving.service.frontend import Unavailable

log = logging.getLogger(__name__)
POLL_S = 1.0
PATIENCE_S = 30.0  # for a worker of a kind, when none is there
SILENCE_S = 10.0  # without a status, after which a worker hangs and its requests go elsewhere
SUMS: tuple[str, ...] = ("transfers", "running", "prefix_queries", "prefix_hits")
SUMS += ("drafts", "accepted", "busy_s", "step_s", "steps")
SUMS += ("preemptions", "kv_moved", "kv_lost", "eplb_moves")


@dataclass(eq=False)
class Member:
    """A worker, as the router knows it.

    Attributes:
      role: `prefill` or `decode`.
      peer: how it is asked.
      load: tokens of the requests that it has from here.
      status: what it last said of itself; None: it does not answer.
      error: why it gets no request, or nothing.
      heard: when it last answered, on `time.monotonic`'s clock.
    """

    role: str
    peer: Peer
    load: int = 0
    status: WorkerStatus | None = None
    error: str = "has not answered yet"
    heard: float = field(default_factory=time.monotonic)
    _limits: set[asyncio.Timeout] = field(default_factory=set)

    @contextlib.asynccontextmanager
    async def busy(self, tokens: int) -> AsyncIterator[Peer]:
        """Counts a request as its load while it has it. A worker that fails is lost.

        Raises:
          PeerError: it hangs.
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
            self.lost(error)
            raise
        finally:
            self._limits.discard(limit)
            self.load -= tokens

    def lost(self, error: CmxError) -> None:
        """It failed, and gets nothing until it answers again."""
        self.status = None
        self.says(str(error))

    def says(self, error: str) -> None:
        """Notes why it gets no request, or, if that is empty, that it does."""
        why = error.removeprefix(self.peer.url).lstrip(": ")
        if why != self.error:
            log.warning("%s worker %s %s", self.role, self.peer.url, why or "serves")
        self.error = why

    def silent(self) -> None:
        """It has not answered; when that was so for too long, it hangs, and all that it has is given up."""
        if time.monotonic() - self.heard > SILENCE_S:
            for limit in self._limits:
                limit.reschedule(0)
            self._limits.clear()


class Members:
    """All workers, asked each second how they are.

    Raises:
      CmxError: there is none of a kind, or an address is none.
    """

    def __init__(
        self, prefill: Sequence[str], decode: Sequence[str], secret: str, patience_s: float | None = None
    ):
        """Args:
        prefill, decode: URLs.
        secret: of all of them.
        patience_s: seconds that a request waits for a worker when there is none; None: `PATIENCE_S`.
        """
        if not prefill or not decode:
            raise CmxError("a router needs workers, expected at least one --prefill URL and one --decode URL")
        kinds = [("prefill", url) for url in prefill] + [("decode", url) for url in decode]
        self.all = [Member(role, Peer(url, secret)) for role, url in kinds]
        self.patience_s = PATIENCE_S if patience_s is None else patience_s
        self._poller: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Begins to ask."""
        await self.look()
        self._poller = asyncio.create_task(self._poll())

    async def close(self) -> None:
        """Asks no more."""
        if self._poller is not None:
            self._poller.cancel()
            await asyncio.gather(self._poller, return_exceptions=True)
        for member in self.all:
            await member.peer.close()

    async def least(self, role: str) -> Member:
        """The worker with the least to do; waits for one if there is none.

        Raises:
          Unavailable: none came.
        """
        until = time.monotonic() + self.patience_s
        while True:
            well = [m for m in self.all if m.role == role and not m.error]
            if well:
                return min(well, key=lambda m: m.load)
            if time.monotonic() > until:
                raise Unavailable(self.missing() or f"no worker can {role} now")
            await asyncio.sleep(POLL_S / 4)

    def missing(self) -> str:
        """What cannot be done now, and why no worker can; or nothing."""
        for role in ("prefill", "decode"):
            errors = {m.peer.url: m.error for m in self.all if m.role == role}
            if all(errors.values()):
                why = "; ".join(f"{url} {error}" for url, error in errors.items())
                return f"no worker can {role} now ({why})"
        return ""

    async def look(self) -> None:
        """Asks every worker how it is; one whose pages do not fit those of most is not used."""
        await asyncio.gather(*(self._ask(member) for member in self.all))
        there = [m for m in self.all if m.status is not None and m.status.role == m.role]
        kinds = Counter(str(m.status.fingerprint) for m in there if m.status)
        usual = kinds.most_common(1)[0][0] if kinds else ""
        whose = next((m for m in there if m.status and str(m.status.fingerprint) == usual), None)
        for member in self.all:
            if member.status is not None:
                member.says(_unfit(member, member.status, whose))

    async def _poll(self) -> None:
        while True:
            await asyncio.sleep(POLL_S)
            await self.look()

    async def _ask(self, member: Member) -> None:
        try:
            member.status, member.heard = await member.peer.status(), time.monotonic()
        except CmxError as error:
            member.lost(error)
            member.silent()

    def workers(self) -> list[dict[str, Any]]:
        """Each worker: what it has from here, and why it gets no more, or nothing."""
        return [
            {"role": m.role, "url": m.peer.url, "load": m.load, "error": m.error or None} for m in self.all
        ]

    def counts(self) -> dict[str, Any]:
        """Sums over the workers, as they last said."""
        said = [m.status for m in self.all if m.status]
        each = [i for status in said for i in status.instances]
        used, pages = (sum(i[name] for i in each) for name in ("pages_used", "pages"))
        sums = {name: sum(status.counts.get(name, 0) for status in said) for name in SUMS}
        return {**sums, "kv_cache_usage": used / pages if pages else 0.0}

    def instances(self) -> list[dict[str, Any]]:
        """Of all workers, one behind the other on the map."""
        found: list[dict[str, Any]] = []
        for member in self.all:
            for i in member.status.instances if member.status else ():
                at = found[-1]["first_npu"] + found[-1]["npus"] if found else 0
                found.append({**i, "name": f"{i['name']} at {member.peer.url}", "first_npu": at})
        return found


def _unfit(member: Member, status: WorkerStatus, other: Member | None) -> str:
    """Why a worker that answers gets no request, or nothing; of pages that differ from another one's, both
    sides."""
    if status.role != member.role:
        return f"is a {status.role} worker, expected one that can {member.role}"
    if status.broken or status.draining:
        return status.broken or "is shutting down"
    if other is None or other.status is None:
        return ""
    here, there = status.fingerprint, other.status.fingerprint
    apart = (name for name in here if here[name] != there.get(name))
    return "; ".join(f"has {name} {here[name]!r}, {other.peer.url} {there.get(name)!r}" for name in apart)
