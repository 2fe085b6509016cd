"""A change of instances while they serve (section 2: the ratio of prefill to decode follows the load)."""

from collections.abc import Sequence
from dataclasses import dataclass

from cmx_jax.serving.executor.instance import Instance
from cmx_jax.serving.scheduling.request import State
from cmx_jax.serving.scheduling.scheduler import Scheduler


@dataclass(frozen=True)
class Recarve:
    """A change of instances that is pending.

    Attributes:
      prefill: Prefill instances after the change.
      decoders: Decode instances after the change.
      deadline: Clock time in seconds at which requests on leaving instances are preempted.
    """

    prefill: list[Instance]
    decoders: list[Instance]
    deadline: float


class Recarver:
    """Replaces the instances of a scheduler as soon as those that leave are idle or their time is up.

    Attributes:
      scheduler: Scheduler whose instances change.
      pending: The change that is pending, or None.
    """

    def __init__(self, scheduler: Scheduler[Instance]):
        self.scheduler = scheduler
        self.pending: Recarve | None = None

    def begin(self, prefill: Sequence[Instance], decoders: Sequence[Instance], grace_s: float) -> None:
        """Gives instances that leave no further requests, and `grace_s` seconds to finish those they have."""
        self.pending = Recarve(list(prefill), list(decoders), self.scheduler.clock() + grace_s)
        self.scheduler.leaving = set(self.scheduler.instances) - {*prefill, *decoders}

    def apply(self) -> None:
        """Replaces the instances if it is time; what still runs on those that leave is preempted."""
        pending = self.pending
        if pending is None:
            return
        running = [
            (i, r)
            for i in self.scheduler.leaving
            for r in i.allocator.places
            if r.state is not State.TRANSFER
        ]
        if running and self.scheduler.clock() < pending.deadline:
            return
        for instance, request in running:
            self.scheduler.preempt(instance, request)
        self.pending = None
        self.scheduler.leaving = set()
        self.scheduler.set_instances(pending.prefill, pending.decoders)
