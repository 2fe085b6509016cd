"""A simulated instance, and its requests."""

import heapq
import math
from dataclasses import dataclass
from functools import lru_cache

from cmx_jax.analysis.simulate.simulated_deployment import InstancePool
from cmx_jax.analysis.simulate.workload import Arrival
from cmx_jax.serving.scheduling.allocator import RankAllocator
from cmx_jax.serving.scheduling.request import Request, SamplingParams


@dataclass(eq=False)
class SimRequest(Request):
    """A request whose prompt has a length and no tokens (`range(length)`).

    Attributes:
      blocks: Ids of the prompt's blocks.
      cached: Number of prompt tokens that came from the prefix cache.
      started: Time at which its first chunk began to run, in seconds; None before.
    """

    blocks: tuple[int, ...] = ()
    cached: int = 0
    started: float | None = None

    @classmethod
    def of(cls, arrival: Arrival) -> "SimRequest":
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
      ready: Requests that join the decode batch at the next step.
      running: Number of requests in the decode batch.
      tokens: Sum of the context lengths of these requests, in tokens.
      ends: Heap of (last step, id, request) for each of these requests.
      busiest: Number of running requests on the busiest rank.
      busy: Seconds in which the instance ran steps.
      row_seconds: Sum over decode steps of their seconds times the requests in the batch.
    """

    def __init__(self, name: str, pool: InstancePool, speed: float):
        self.name = name
        self.allocator = RankAllocator(pool.capacity, pool.ranks)
        self.sharing, self.speed = pool.sharing, speed
        self.ready: list[SimRequest] = []
        self.steps = self.running = self.busiest = 0
        self.tokens = self.busy = self.row_seconds = 0.0
        self.ends: list[tuple[int, int, SimRequest]] = []
        self._count = [0] * pool.ranks  # running requests of each rank
        self._having = [pool.ranks] + [0] * pool.capacity.sequences  # number of ranks by running requests

    def release(self, request: Request) -> None:
        """Frees the pages and the row of a request."""
        self.allocator.release(request)

    def join(self) -> None:
        """Adds the ready requests to the batch."""
        for job in self.ready:
            steps = math.ceil((job.params.max_tokens - 1) / self.speed)
            heapq.heappush(self.ends, (self.steps + steps, job.id, job))
            self.running += 1
            self.tokens += len(job.prompt) + 1
            self._shift(self.allocator.places[job].rank, 1)
        self.ready.clear()

    def advance(self, steps: int) -> list[SimRequest]:
        """Advances by `steps` decode steps; returns the requests that finish."""
        self.steps += steps
        self.tokens += self.running * steps * self.speed
        finished = []
        while self.ends and self.ends[0][0] <= self.steps:
            job = heapq.heappop(self.ends)[2]
            self.running -= 1
            self.tokens -= (
                len(job.prompt) + 1 + math.ceil((job.params.max_tokens - 1) / self.speed) * self.speed
            )
            self._shift(self.allocator.places[job].rank, -1)
            finished.append(job)
        return finished

    def _shift(self, rank: int, by: int) -> None:
        before = self._count[rank]
        self._count[rank] = after = before + by
        self._having[before] -= 1
        self._having[after] += 1
        if after > self.busiest:
            self.busiest = after
        elif not self._having[self.busiest]:
            self.busiest -= 1
