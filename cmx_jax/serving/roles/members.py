"""The workers that a router has: who is well, who has the least to do."""

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from typing import Any

from cmx_jax.errors import CmxError
from cmx_jax.serving.roles.peer import Peer
from cmx_jax.serving.service import Unavailable

POLL_S = 1.0
PATIENCE_S = 30.0  # for a worker of a kind, when none is there
SUMS: tuple[str, ...] = ("transfers", "running", "prefix_queries", "prefix_hits")
SUMS += ("drafts", "accepted", "busy_s", "step_s", "steps")


@dataclass(eq=False)
class Member:
    """A worker, as the router knows it.

    Attributes:
      role: `prefill` or `decode`.
      peer: how it is asked.
      load: tokens of the requests that it has from here.
      status: what it last said of itself; None: it does not answer, or does not fit.
      error: why not.
    """

    role: str
    peer: Peer
    load: int = 0
    status: dict[str, Any] | None = None
    error: str = "it has not answered yet"

    @property
    def well(self) -> bool:
        return self.status is not None and not self.status["draining"]

    @contextlib.asynccontextmanager
    async def busy(self, tokens: int) -> AsyncIterator[Peer]:
        """Counts a request as its load while it has it."""
        self.load += tokens
        try:
            yield self.peer
        finally:
            self.load -= tokens

    def lost(self, error: CmxError) -> None:
        """It failed, and gets nothing until it answers again."""
        self.status, self.error = None, str(error)


class Members:
    """All workers, asked each second how they are.

    Raises:
      CmxError: there is none of a kind, or an address is none.
    """

    def __init__(self, prefill: Sequence[str], decode: Sequence[str], secret: str):
        if not prefill or not decode:
            raise CmxError("a router needs workers, expected at least one --prefill URL and one --decode URL")
        kinds = [("prefill", url) for url in prefill] + [("decode", url) for url in decode]
        self.all = [Member(role, Peer(url, secret)) for role, url in kinds]
        self._poller: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Begins to ask."""
        await self.look()
        self._poller = asyncio.create_task(self._poll())

    async def close(self) -> None:
        """Asks no more."""
        if self._poller is not None:
            self._poller.cancel()
        for member in self.all:
            await member.peer.close()

    async def least(self, role: str) -> Member:
        """The worker with the least to do; waits for one if there is none.

        Raises:
          Unavailable: none came.
        """
        until = time.monotonic() + PATIENCE_S
        while True:
            well = [m for m in self.all if m.role == role and m.well]
            if well:
                return min(well, key=lambda m: m.load)
            if time.monotonic() > until:
                why = "; ".join(f"{m.peer.url}: {m.error}" for m in self.all if m.role == role)
                raise Unavailable(f"no worker can {role} now ({why})")
            await asyncio.sleep(POLL_S / 4)

    async def look(self) -> None:
        """Asks every worker how it is; one whose pages do not fit the others' is not used."""
        await asyncio.gather(*(self._ask(member) for member in self.all))

    async def _poll(self) -> None:
        while True:
            await asyncio.sleep(POLL_S)
            await self.look()

    async def _ask(self, member: Member) -> None:
        try:
            status = await member.peer.status()
        except CmxError as error:
            member.lost(error)
            return
        member.error = self._misfit(member, status)
        member.status = None if member.error else status

    def _misfit(self, member: Member, status: dict[str, Any]) -> str:
        """Why a worker cannot be used with the others (both sides of what differs), or nothing."""
        if status["role"] != member.role:
            return f"it is a {status['role']} worker, expected one that can {member.role}"
        other = next((m for m in self.all if m is not member and m.status is not None), None)
        if other is None or other.status is None:
            return ""
        here, there = status["fingerprint"], other.status["fingerprint"]
        apart = (name for name in here if here[name] != there.get(name))
        return "; ".join(
            f"{name} is {here[name]!r} there and {there.get(name)!r} at {other.peer.url}" for name in apart
        )

    def counts(self) -> dict[str, Any]:
        """Sums over the workers, as they last said."""
        said = [m.status for m in self.all if m.status]
        each = [i for status in said for i in status["instances"]]
        used, pages = (sum(i[name] for i in each) for name in ("pages_used", "pages"))
        sums = {name: sum(status["counts"][name] for status in said) for name in SUMS}
        return {**sums, "kv_cache_usage": used / pages if pages else 0.0}

    def instances(self) -> list[dict[str, Any]]:
        """Of all workers, one behind the other on the map."""
        found: list[dict[str, Any]] = []
        for member in self.all:
            for i in member.status["instances"] if member.status else ():
                at = found[-1]["first_npu"] + found[-1]["npus"] if found else 0
                found.append({**i, "name": f"{i['name']} at {member.peer.url}", "first_npu": at})
        return found
