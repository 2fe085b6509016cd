"""An instance in virtual time, and the requests that it has."""

import heapq
import math
from dataclasses import dataclass
from functools import lru_cache

from cmx_jax.analysis.simulate.deployment import Pool
from cmx_jax.analysis.simulate.workload import Arrival
from cmx_jax.serving.scheduling.allocator import RankAllocator
from cmx_jax.serving.scheduling.request import Request, SamplingParams


@dataclass(eq=False)
class Job(Request):
    """A request whose prompt has a length and no tokens (`range(length)`).

    Attributes:
      blocks: of its prompt.
      cached: tokens of it that lay in the prefix cache.
      started: when its first chunk began to run.
    """

    blocks: tuple[int, ...] = ()
    cached: int = 0
    started: float | None = None

    @classmethod
    def of(cls, arrival: Arrival) -> "Job":
        return cls(
            range(arrival.prompt), _params(arrival.output), arrived=arrival.time, blocks=arrival.blocks
        )


@lru_cache(1 << 16)
def _params(output: int) -> SamplingParams:
    return SamplingParams(max_tokens=output, ignore_eos=True)


class Virtual:
    """An instance whose decode batch is counted instead of computed.

    Attributes:
      allocator: Rows and pages of its ranks.
      ready: requests that join the batch with its next step.
      running: requests in it.
      tokens: that they attend to, together.
      ends: of each the step after which it is through.
      busiest: most requests of a rank.
      busy, row_seconds: seconds in which it ran steps; those of decode, times the requests in them.
    """

    def __init__(self, name: str, pool: Pool, speed: float):
        self.name = name
        self.allocator = RankAllocator(pool.capacity, pool.ranks)
        self.sharing, self.speed = pool.sharing, speed
        self.ready: list[Job] = []
        self.steps = self.running = self.busiest = 0
        self.tokens = self.busy = self.row_seconds = 0.0
        self.ends: list[tuple[int, int, Job]] = []
        self._count = [0] * pool.ranks  # running requests by rank
        self._having = [pool.ranks] + [0] * pool.capacity.sequences  # ranks by running requests

    def release(self, request: Request) -> None:
        """Frees the pages and the row of a request."""
        self.allocator.release(request)

    def join(self) -> None:
        """Takes those that are ready into the batch."""
        for job in self.ready:
            steps = math.ceil((job.params.max_tokens - 1) / self.speed)
            heapq.heappush(self.ends, (self.steps + steps, job.id, job))
            self.running += 1
            self.tokens += len(job.prompt) + 1
            self._shift(self.allocator.places[job].rank, 1)
        self.ready.clear()

    def advance(self, steps: int) -> list[Job]:
        """Lets steps pass; returns the requests that are through."""
        self.steps += steps
        self.tokens += self.running * steps * self.speed
        through = []
        while self.ends and self.ends[0][0] <= self.steps:
            job = heapq.heappop(self.ends)[2]
            self.running -= 1
            self.tokens -= (
                len(job.prompt) + 1 + math.ceil((job.params.max_tokens - 1) / self.speed) * self.speed
            )
            self._shift(self.allocator.places[job].rank, -1)
            through.append(job)
        return through

    def _shift(self, rank: int, by: int) -> None:
        before = self._count[rank]
        self._count[rank] = after = before + by
        self._having[before] -= 1
        self._having[after] += 1
        if after > self.busiest:
            self.busiest = after
        elif not self._having[self.busiest]:
            self.busiest -= 1
