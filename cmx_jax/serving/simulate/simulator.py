"""A supernode in virtual time: the scheduler's decisions, with events where the engine runs steps.

What is approximated:

* Decode steps between two events (a request joins, or is through) are one event. They take the time of a step
  at the mean context between the two, and at most `JUMP` steps are taken together.
* A step's drafts are right at the mean rate: a request gets `1 + acceptance` tokens in every step.
* All ranks of an instance step together, in the time of the busiest one.
* A rank sends or receives the pages of one request at a time, at full speed.
"""

import heapq
import math
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import count
from typing import Any

from cmx_jax.errors import CmxError
from cmx_jax.serving.ranks import Capacity, Ranks
from cmx_jax.serving.request import Request, SamplingParams, State
from cmx_jax.serving.scheduler import Scheduler
from cmx_jax.serving.simulate.prefix import PrefixCache
from cmx_jax.serving.simulate.times import StepTimes
from cmx_jax.serving.simulate.workload import Arrival
from cmx_jax.serving.transfer import prefill_tp_rank

JUMP = 64  # decode steps


@dataclass(frozen=True, kw_only=True)
class Pool:
    """Equal instances.

    Attributes:
      instances: how many.
      npus: of each.
      ranks: of each that have sequences of their own.
      sharing: ranks that hold each of these sequences together (section 4.3.1).
      capacity: of a rank.
    """

    instances: int = 1
    npus: int = 1
    ranks: int = 1
    sharing: int = 1
    capacity: Capacity = field(default_factory=Capacity)

    def __post_init__(self) -> None:
        room = {f"capacity.{name}": value for name, value in vars(self.capacity).items()}
        for name, value in {**vars(self), **room}.items():
            if isinstance(value, int) and value < 1:
                raise CmxError(f"{name} is {value}, expected at least 1")


@dataclass(frozen=True, kw_only=True)
class Deployment:
    """What runs on a supernode.

    Attributes:
      prefill: the instances that take prompts.
      decode: those that continue them; None: the same ones.
      acceptance: drafts of a decode step that are right on average.
      prefix_blocks: of 512 tokens, that the prefix cache holds.
      one_host: all instances share one machine and step in turn, as those of `Engine` do.
    """

    prefill: Pool
    decode: Pool | None
    acceptance: float = 0.0
    prefix_blocks: int = 0
    one_host: bool = False

    def __post_init__(self) -> None:
        if not 0 <= self.acceptance < math.inf or self.prefix_blocks < 0:
            raise CmxError(
                f"acceptance is {self.acceptance:g} and prefix_blocks {self.prefix_blocks}, "
                "expected zero or more"
            )

    @property
    def npus(self) -> int:
        return sum(pool.instances * pool.npus for pool in (self.prefill, self.decode) if pool)


class Events:
    """What happens when, and the time now; equal times in the order in which they were said."""

    def __init__(self) -> None:
        self.now = 0.0
        self.heap: list[tuple[float, int, Callable[..., None], Any]] = []
        self._order = count()

    def at(self, time: float, call: Callable[..., None], argument: Any) -> None:
        heapq.heappush(self.heap, (time, next(self._order), call, argument))

    def next(self) -> None:
        self.now, _, call, argument = heapq.heappop(self.heap)
        call(argument)


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


class Virtual(Ranks):
    """An instance whose decode batch is counted instead of computed.

    Attributes:
      ready: requests that join the batch with its next step.
      running: requests in it.
      tokens: that they attend to, together.
      ends: of each the step after which it is through.
      busiest: most requests of a rank.
      busy, row_seconds: seconds in which it ran steps; those of decode, times the requests in them.
    """

    def __init__(self, name: str, pool: Pool, speed: float):
        super().__init__(name, pool.capacity, pool.ranks)
        self.sharing, self.speed = pool.sharing, speed
        self.ready: list[Job] = []
        self.steps = self.running = self.busiest = 0
        self.tokens = self.busy = self.row_seconds = 0.0
        self.ends: list[tuple[int, int, Job]] = []
        self._count = [0] * self.ranks  # running requests by rank
        self._having = [self.ranks] + [0] * self.capacity.sequences  # ranks by running requests

    def join(self) -> None:
        """Takes those that are ready into the batch."""
        for job in self.ready:
            steps = math.ceil((job.params.max_tokens - 1) / self.speed)
            heapq.heappush(self.ends, (self.steps + steps, job.id, job))
            self.running += 1
            self.tokens += len(job.prompt) + 1
            self._shift(self.places[job].rank, 1)
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
            self._shift(self.places[job].rank, -1)
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


class Host:
    """What runs the steps of its instances one at a time, in turn: prefill of each, then decode of each."""

    def __init__(self, node: "Supernode", prefill: list[Virtual], decoders: list[Virtual]):
        self.node, self.prefill, self.decoders = node, prefill, decoders
        self.work = [(i, self._start_prefill) for i in prefill] + [(i, self._start_decode) for i in decoders]
        self.turn = 0
        self.step: object | None = None  # what runs, and is still valid: a step that is cut ends another way
        self.instance: Virtual | None = None  # whose decode steps run
        self.began = self.seconds = 0.0
        self.steps = 0

    def wake(self) -> None:
        """There is new work: it begins now, or behind the decode step that runs."""
        if self.step is None:
            self.start()
        elif self.instance is not None and self.steps > 1 and self.seconds > 0:
            done = max(math.ceil((self.node.events.now - self.began) / self.seconds - 1e-9), 1)
            if done < self.steps:
                self._decode_for(self.instance, done)

    def start(self) -> None:
        """The next step of whoever has one to run."""
        for _ in self.work:
            if self.node.lockstep and self.turn == 0:
                self.node.place()
            if self.node.lockstep and self.turn == len(self.prefill):
                self.node.receive()
            instance, start = self.work[self.turn]
            self.turn = (self.turn + 1) % len(self.work)
            if start(instance):
                return
        self.turn = 0

    def _start_prefill(self, instance: Virtual) -> bool:
        if not instance.prefilling:
            return False
        node, now = self.node, self.node.events.now
        pieces = instance.next_pieces()
        fetch = 0
        for row in pieces:
            for piece in row:
                job: Any = piece.request
                if job.started is None:
                    job.started, fetch = now, max(fetch, job.cached)
        seconds = node.times.prefill(pieces) + (node.times.fetch(fetch) if fetch else 0.0)
        instance.busy += seconds
        self.step, self.instance = pieces, None
        node.events.at(now + seconds, self._prefill_ended, (instance, pieces))
        return True

    def _prefill_ended(self, ran: tuple[Virtual, Any]) -> None:
        instance, pieces = ran
        self.step = None
        self.node.prefill_ended(instance, pieces)
        if self.step is None:
            self.start()

    def _start_decode(self, instance: Virtual) -> bool:
        instance.join()
        if not instance.running:
            return False
        steps = min(instance.ends[0][0] - instance.steps, JUMP)
        others = any(i.running or i.ready for i in self.decoders if i is not instance)
        waiting = self.node.lockstep and self.node.waiting
        if others or waiting or any(i.prefilling for i in self.prefill):
            steps = 1  # then it is another's turn
        self.began, self.instance = self.node.events.now, instance
        self._decode_for(instance, steps)
        return True

    def _decode_for(self, instance: Virtual, steps: int) -> None:
        """The decode steps that run are so many, from `began` on."""
        context = instance.tokens / instance.running + (steps - 1) / 2 * instance.speed
        self.seconds = self.node.times.decode(instance.busiest, context)
        self.steps, self.step = steps, object()
        ends = max(self.began + steps * self.seconds, self.node.events.now)
        self.node.events.at(ends, self._decode_ended, self.step)

    def _decode_ended(self, step: object) -> None:
        instance = self.instance
        if step is not self.step or instance is None:  # it was cut
            return
        seconds = self.node.events.now - self.began
        instance.busy += seconds
        instance.row_seconds += seconds * instance.running
        self.step = None
        self.node.decode_ended(instance, self.steps)
        if self.step is None:
            self.start()


class Supernode(Scheduler[Virtual]):
    """The instances of a deployment, their prefix cache and what connects them."""

    def __init__(self, deployment: Deployment, times: StepTimes, events: Events, done: Callable[[Job], None]):
        self.times, self.events, self.done = times, events, done
        speed = 1 + deployment.acceptance
        prefill = [
            Virtual(f"prefill-{i}", deployment.prefill, speed) for i in range(deployment.prefill.instances)
        ]
        pool = deployment.decode
        decoders = (
            prefill if pool is None else [Virtual(f"decode-{i}", pool, speed) for i in range(pool.instances)]
        )
        super().__init__(prefill, decoders, lambda: events.now)
        self.lockstep = deployment.one_host  # prompts are admitted, and moved, at their time in a turn
        self.prefix = PrefixCache(deployment.prefix_blocks)
        self.outstanding = 0  # requests here that are not finished
        everyone = list(dict.fromkeys([*prefill, *decoders]))
        groups = [everyone] if deployment.one_host else [[i] for i in everyone]
        self._hosts: dict[Virtual, Host] = {}
        for group in groups:
            host = Host(self, [i for i in group if i in prefill], [i for i in group if i in decoders])
            self._hosts |= dict.fromkeys(group, host)
        self._link_free: defaultdict[tuple[Virtual, int], float] = defaultdict(float)

    def submit(self, job: Job) -> None:
        """Takes a request that arrives now."""
        self._queue(job)
        self.outstanding += 1
        self._go_on()

    def prefill_ended(self, at: Virtual, pieces: Any) -> None:
        job: Any
        for job, _, _ in at.prefilled(pieces):
            if job.blocks:
                self.prefix.use(job.blocks)
            self._prefilled(at, job, last=job.params.max_tokens == 1)
            if job.state is State.DECODE:
                at.ready.append(job)
        self._go_on()

    def decode_ended(self, at: Virtual, steps: int) -> None:
        for job in at.advance(steps):
            self._finish(at, job)
        self._go_on()

    def _go_on(self, *fresh: Virtual) -> None:
        """What the scheduler does between steps; then those that have something new begin, `fresh` too."""
        woken = list(fresh)
        if self.lockstep:
            woken.append(self.prefill[0])
        else:
            woken += self.receive() if self.transfers else ()
            woken += self.place() if self.waiting else ()
        for instance in woken:
            self._hosts[instance].wake()

    def receive(self) -> list[Virtual]:
        """Lets pages move to decode; returns the instances where they are already."""
        woken = []
        for move in self._receive():
            ends = self._sent(*move)
            if ends > self.events.now:
                self.events.at(ends, self._received, move)
            else:
                woken.append(self._arrived(*move))
        return woken

    def place(self) -> list[Virtual]:
        """Admits what waits; returns the instances that were given something."""
        placed = self._admit()
        for at, job in placed:
            if job.blocks:
                width = at.capacity.page_width
                found = min(self.prefix.match(job.blocks), len(job.prompt) - 1)  # one token is left to run
                job.cached = job.prefilled = found // width * width
        return [at for at, _ in placed]

    def _sent(self, source: Virtual, target: Virtual, job: Request) -> float:
        """When a request's pages have come over. Each rank has one link, which one request uses at a time."""
        receiver = target.places[job].rank
        sender = source.places[job].rank * source.sharing
        if source.sharing > 1:
            sizes = {"prefill_tp_size": source.sharing, "decode_tp_size": 1, "decode_dp_size": target.ranks}
            sender += prefill_tp_rank(receiver, 0, **sizes)
        free, links = self._link_free, ((source, sender), (target, receiver))
        ends = max(self.events.now, free[links[0]], free[links[1]]) + self.times.transfer(len(job.prompt))
        free[links[0]] = free[links[1]] = ends
        return ends

    def _received(self, move: tuple[Virtual, Virtual, Any]) -> None:
        self._go_on(self._arrived(*move))

    def _arrived(self, source: Virtual, target: Virtual, job: Any) -> Virtual:
        self._moved(source, job)
        target.ready.append(job)
        return target

    def _finish(self, at: Virtual, request: Any) -> None:
        super()._finish(at, request)
        self.outstanding -= 1
        self.done(request)
