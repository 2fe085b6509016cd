"""A supernode in virtual time: the scheduler's decisions, with events in place of the engine's steps.

Approximations:

* Decode steps between two events (a request joins or finishes) are one event. Each takes the time of a step
  at the mean context between the two, and at most `JUMP` steps (`events.py`) are taken together.
* Drafts are accepted at the mean rate: a request gets `1 + acceptance` tokens in every step.
* All ranks of an instance step together, in the time of the busiest one.
* A rank sends or receives the pages of one request at a time, at full speed.
"""

from collections import defaultdict
from collections.abc import Callable
from typing import Any

from cmx_jax.analysis.simulate.events import Events, Host
from cmx_jax.analysis.simulate.prefix import PrefixCache
from cmx_jax.analysis.simulate.simulated_deployment import SimulatedDeployment
from cmx_jax.analysis.simulate.times import StepTimes
from cmx_jax.analysis.simulate.virtual import SimRequest, Virtual
from cmx_jax.serving.kv.mapping import prefill_tp_rank
from cmx_jax.serving.scheduling.request import Request, State
from cmx_jax.serving.scheduling.scheduler import Scheduler


class SimSupernode:
    """The instances of a deployment with their scheduler, prefix cache and links."""

    def __init__(
        self,
        deployment: SimulatedDeployment,
        times: StepTimes,
        events: Events,
        done: Callable[[SimRequest], None],
    ):
        self.times, self.events, self.done = times, events, done
        speed = 1 + deployment.acceptance
        prefill = [
            Virtual(f"prefill-{i}", deployment.prefill, speed) for i in range(deployment.prefill.instances)
        ]
        pool = deployment.decode
        decoders = (
            prefill if pool is None else [Virtual(f"decode-{i}", pool, speed) for i in range(pool.instances)]
        )
        self.scheduler = Scheduler(prefill, decoders, lambda: events.now)
        self.scheduler.subscribe(self._on_change)
        self.lockstep = deployment.one_host  # prompts are admitted and moved at fixed points of a round
        self.prefix = PrefixCache(deployment.prefix_blocks)
        self.outstanding = 0  # unfinished requests of this supernode
        instances = self.scheduler.instances
        groups = [instances] if deployment.one_host else [[i] for i in instances]
        self._hosts: dict[Virtual, Host] = {}
        for group in groups:
            host = Host(self, [i for i in group if i in prefill], [i for i in group if i in decoders])
            self._hosts |= dict.fromkeys(group, host)
        self._link_free: defaultdict[tuple[Virtual, int], float] = defaultdict(float)

    def submit(self, job: SimRequest) -> None:
        """Queues a request that arrives now."""
        self.scheduler.enqueue(job)
        self.outstanding += 1
        self._go_on()

    def prefill_ended(self, instance: Virtual, pieces: Any) -> None:
        job: Any
        for job, _, _ in instance.allocator.mark_prefilled(pieces):
            if job.blocks:
                self.prefix.use(job.blocks)
            self.scheduler.finish_prefill(instance, job, last=job.params.max_tokens == 1)
            if job.state is State.DECODE:
                instance.ready.append(job)
        self._go_on()

    def decode_ended(self, instance: Virtual, steps: int) -> None:
        for job in instance.advance(steps):
            self.scheduler.finish(instance, job)
        self._go_on()

    def _go_on(self, *fresh: Virtual) -> None:
        """Runs the scheduler between steps, then wakes instances with new work and those in `fresh`."""
        woken = list(fresh)
        if self.lockstep:
            woken.append(self.scheduler.prefill[0])
        else:
            woken += self.receive() if self.scheduler.transfers else ()
            woken += self.place() if self.scheduler.waiting else ()
        for instance in woken:
            self._hosts[instance].wake()

    def receive(self) -> list[Virtual]:
        """Starts page transfers to decode; returns the instances whose transfers take no time."""
        woken = []
        for move in self.scheduler.receive():
            ends = self._sent(*move)
            if ends > self.events.now:
                self.events.at(ends, self._received, move)
            else:
                woken.append(self._arrived(*move))
        return woken

    def place(self) -> list[Virtual]:
        """Admits waiting requests; returns the instances that received some."""
        placed = self.scheduler.admit()
        job: Any  # a SimRequest
        for instance, job in placed:
            if job.blocks:
                width = instance.allocator.capacity.page_width
                cached = min(self.prefix.match(job.blocks), len(job.prompt) - 1)  # one token must run
                job.cached = job.prefilled = cached // width * width
        return [instance for instance, _ in placed]

    def _sent(self, source: Virtual, target: Virtual, job: Request) -> float:
        """Time at which a request's pages arrive. Each rank has one link, for one request at a time."""
        receiver = target.allocator.places[job].rank
        sender = source.allocator.places[job].rank * source.sharing
        if source.sharing > 1:
            sizes = {
                "prefill_tp_size": source.sharing,
                "decode_tp_size": 1,
                "decode_dp_size": target.allocator.ranks,
            }
            sender += prefill_tp_rank(receiver, 0, **sizes)
        free, links = self._link_free, ((source, sender), (target, receiver))
        ends = max(self.events.now, free[links[0]], free[links[1]]) + self.times.transfer(len(job.prompt))
        free[links[0]] = free[links[1]] = ends
        return ends

    def _received(self, move: tuple[Virtual, Virtual, Any]) -> None:
        self._go_on(self._arrived(*move))

    def _arrived(self, source: Virtual, target: Virtual, job: Any) -> Virtual:
        self.scheduler.finish_move(source, target, job)
        target.ready.append(job)
        return target

    def _on_change(self, request: Any, state: State, instance: Virtual | None) -> None:
        """Counts a finished request."""
        del instance
        if state is State.FINISHED:
            self.outstanding -= 1
            self.done(request)
