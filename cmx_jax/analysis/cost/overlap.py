"""Schedules the operators of several streams on one machine and finds those that the step waits for."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby


@dataclass(frozen=True)
class Task:
    """An operator on the resources of a rank.

    Attributes:
      name: Name of the operator.
      resources: Resources that it holds exclusively while it runs.
      us: Duration in microseconds.
      bound: Resource or phase that accounts for most of the duration.
      memory: Time in microseconds for which the operator keeps memory busy.
    """

    name: str
    resources: tuple[str, ...]
    us: float
    bound: str
    memory: float = 0.0


@dataclass(frozen=True)
class _Block:
    """Consecutive tasks of one stream on the same resources.

    Attributes:
      tasks: Tasks of the block, in order.
      end: End of the last task, in microseconds.
      before: Block whose end this block had to wait for, if any.
    """

    tasks: tuple[Task, ...]
    end: float
    before: "_Block | None"


def critical_path(streams: Sequence[Sequence[Task]]) -> list[Task]:
    """Runs the streams in parallel and returns the critical path in order of time.

    Each task of the path begins when the one before it ends, so the durations add up to the total time. A
    stream runs its tasks in order; each waits for its resources. Consecutive tasks of a stream on the same
    resources run without interruption. The block that can start first runs next; of several, the one that has
    waited longest.
    """
    queues = [[tuple(run) for _, run in groupby(tasks, lambda t: t.resources)] for tasks in streams]
    position = [0] * len(queues)
    last: list[_Block | None] = [None] * len(queues)
    holder: dict[str, _Block] = {}

    def waits(s: int) -> list[_Block | None]:
        """Returns the blocks that must end before the stream's next block begins."""
        return [last[s], *(holder.get(resource) for resource in queues[s][position[s]][0].resources)]

    def start(s: int) -> tuple[float, float]:
        return max(_end(block) for block in waits(s)), _end(last[s])

    while unfinished := [s for s in range(len(queues)) if position[s] < len(queues[s])]:
        s = min(unfinished, key=start)
        before, run = max(waits(s), key=_end), queues[s][position[s]]
        added = _Block(run, _end(before) + sum(task.us for task in run), before)
        holder |= dict.fromkeys(run[0].resources, added)
        last[s] = added
        position[s] += 1
    path: list[Task] = []
    block = max(last, key=_end, default=None)
    while block is not None:
        path[:0] = block.tasks
        block = block.before
    return path


def _end(block: _Block | None) -> float:
    return block.end if block else 0.0
