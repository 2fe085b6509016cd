"""Virtual time, and hosts that run steps in it."""

import heapq
import math
from collections.abc import Callable
from itertools import count
from typing import Any

from cmx_jax.analysis.simulate.virtual import Virtual

JUMP = 64  # maximum number of decode steps in one event


class Events:
    """Event queue and clock; events at equal times run in the order in which they were added."""

    def __init__(self) -> None:
        self.now = 0.0
        self.heap: list[tuple[float, int, Callable[..., None], Any]] = []
        self._order = count()

    def at(self, time: float, call: Callable[..., None], argument: Any) -> None:
        heapq.heappush(self.heap, (time, next(self._order), call, argument))

    def next(self) -> None:
        self.now, _, call, argument = heapq.heappop(self.heap)
        call(argument)


class Host:
    """Runs its instances' steps one at a time, round-robin: each decode instance, then each prefill instance.

    An instance that does both prefills first, as in `cmx_jax.serving.engine.engine`.

    `node` is the `cmx_jax.analysis.simulate.simulator.SimSupernode` that they belong to.
    """

    def __init__(self, node: Any, prefill: list[Virtual], decoders: list[Virtual]):
        self.node, self.prefill, self.decoders = node, prefill, decoders
        prefills = [(i, self._start_prefill) for i in prefill]
        decodes = [(i, self._start_decode) for i in decoders]
        both = any(i in decoders for i in prefill)
        self.work = prefills + decodes if both else decodes + prefills
        self.receives = len(prefill) if both else 0  # turn at which prompts move to decode
        self.turn = 0
        self.step: object | None = None  # the step that runs; replaced when it is cut short
        self.instance: Virtual | None = None  # the instance whose decode steps run
        self.began = self.seconds = 0.0
        self.steps = 0

    def wake(self) -> None:
        """Starts new work now, or after the decode step that is running."""
        if self.step is None:
            self.start()
        elif self.instance is not None and self.steps > 1 and self.seconds > 0:
            done = max(math.ceil((self.node.events.now - self.began) / self.seconds - 1e-9), 1)
            if done < self.steps:
                self._decode_for(self.instance, done)

    def start(self) -> None:
        """Starts the next step, in turn, of an instance that has one to run."""
        for _ in self.work:
            if self.node.lockstep and self.turn == 0:
                self.node.place()
            if self.node.lockstep and self.turn == self.receives:
                self.node.receive()
            instance, start = self.work[self.turn]
            self.turn = (self.turn + 1) % len(self.work)
            if start(instance):
                return
        self.turn = 0

    def _start_prefill(self, instance: Virtual) -> bool:
        if not instance.allocator.prefilling:
            return False
        node, now = self.node, self.node.events.now
        pieces = instance.allocator.next_pieces()
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
        contended = any(i.running or i.ready for i in self.decoders if i is not instance)
        waiting = self.node.lockstep and self.node.scheduler.waiting
        if contended or waiting or any(i.allocator.prefilling for i in self.prefill):
            steps = 1  # then it is the next instance's turn
        self.began, self.instance = self.node.events.now, instance
        self._decode_for(instance, steps)
        return True

    def _decode_for(self, instance: Virtual, steps: int) -> None:
        """Sets the number of decode steps that run as one event from `began` on."""
        context = instance.tokens / instance.running + (steps - 1) / 2 * instance.speed
        self.seconds = self.node.times.decode(instance.busiest, context)
        self.steps, self.step = steps, object()
        ends = max(self.began + steps * self.seconds, self.node.events.now)
        self.node.events.at(ends, self._decode_ended, self.step)

    def _decode_ended(self, step: object) -> None:
        instance = self.instance
        if step is not self.step or instance is None:  # it was cut short
            return
        seconds = self.node.events.now - self.began
        instance.busy += seconds
        instance.row_seconds += seconds * instance.running
        self.step = None
        self.node.decode_ended(instance, self.steps)
        if self.step is None:
            self.start()
