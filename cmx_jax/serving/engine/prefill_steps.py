"""Prefill steps of an engine, which run beside its decode steps.

All instances start before any is waited for. A step that is not ready when a turn ends is looked at again in
the next one; if nothing decodes, the turn waits for the oldest step.
"""

import time
from contextlib import ExitStack

from cmx_jax.errors import CmxError
from cmx_jax.model.rebalance import Move
from cmx_jax.serving.engine.checks import check_rebalanced
from cmx_jax.serving.engine.page_mover import PageMover
from cmx_jax.serving.engine.timeline import Timeline
from cmx_jax.serving.executor.instance import Instance
from cmx_jax.serving.executor.rebalancing import rebalance_all
from cmx_jax.serving.scheduling.request import Request
from cmx_jax.serving.scheduling.scheduler import Scheduler


class PrefillSteps:
    """Starts and ends the prefill steps of a scheduler's instances.

    Attributes:
      eplb_interval: Prefill steps, of all instances together, after which the experts of all prefill
        instances are placed by the sum of their loads; 0: never.
      running: Instances whose step has started and not ended, in the order of their starts.
      steps: Number of steps so far.
      step_s: Seconds in which the engine waited for prefill steps.
      moves: Results of the rebalancings so far.
    """

    def __init__(
        self, scheduler: Scheduler[Instance], mover: PageMover, timeline: Timeline, eplb_interval: int = 0
    ):
        if eplb_interval < 0:
            raise CmxError(f"prefill_eplb_interval is {eplb_interval}, expected zero (never) or more")
        check_rebalanced(scheduler.prefill if eplb_interval else ())
        self._scheduler, self._mover, self._timeline = scheduler, mover, timeline
        self.eplb_interval = eplb_interval
        self.running: dict[Instance, ExitStack] = {}  # with the open entry of the timeline
        self.steps, self.step_s = 0, 0.0
        self.moves: list[Move] = []

    def reset(self) -> None:
        """Forgets the steps that are running."""
        self.running.clear()

    def reset_counters(self) -> None:
        """Sets all counters to zero."""
        self.steps, self.step_s = 0, 0.0
        self.moves.clear()

    def _blocks(self, instance: Instance) -> bool:
        """True if an instance is waited for within a turn.

        It decodes too, or its processes must agree on an order, or there is nothing to run beside it.
        """
        scheduler = self._scheduler
        return instance in scheduler.both or not instance.programs.is_local or not scheduler.decoders

    def start(self) -> None:
        """Starts a step on each instance that has work, and is not waited for by `run_blocking`."""
        for instance in self._scheduler.prefill:
            if not self._blocks(instance):
                self._start(instance)

    def run_blocking(self) -> list[Request]:
        """Runs a step on each instance that must be waited for; returns the requests that finished."""
        instances = [i for i in self._scheduler.prefill if self._blocks(i)]
        for instance in instances:
            self._start(instance)
        return [r for i in instances if i in self.running for r in self._end(i)]

    def end_ready(self) -> list[Request]:
        """Ends the steps that are ready, and the oldest one if there is nothing to decode.

        Returns:
          The requests whose first token was their last.
        """
        scheduler = self._scheduler
        decodes = scheduler.transfers or any(i.allocator.decodes for i in scheduler.decoders)
        running = list(self.running)
        if running and not decodes:
            finished, running = self._end(running[0]), running[1:]
        else:
            finished = []
        for instance in running:
            if instance.prefill_ready:
                finished += self._end(instance)
        return finished

    def _start(self, instance: Instance) -> None:
        """Starts a step, if the instance has work and none is running."""
        if instance.allocator.prefilling and instance not in self.running:
            entry = self.running[instance] = ExitStack()
            requests = len(instance.allocator.prefilling)
            entry.enter_context(self._timeline.step(instance.name, "prefill", requests=requests))
            instance.start_prefill()

    def _end(self, instance: Instance) -> list[Request]:
        """Waits for a step; returns the requests whose first token was their last."""
        began, finished = time.perf_counter(), []
        with self.running.pop(instance):
            completed = instance.end_prefill()
        self.step_s += time.perf_counter() - began
        self.steps += 1
        ends = {r: r.add(r.next_token, instance.config.eos_token_ids) for r in completed}
        stay = [r for r in completed if ends[r] or instance in self._scheduler.both]
        self._mover.store(instance, stay)
        for request, last in ends.items():
            self._scheduler.finish_prefill(instance, request, last)
            finished += [request] * last
        if self.eplb_interval and self.steps % self.eplb_interval == 0:
            self.moves += rebalance_all(self._scheduler.prefill)
        return finished
