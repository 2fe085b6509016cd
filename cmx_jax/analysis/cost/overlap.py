"""Operators of several streams that share a machine: when each runs, and which of them the step waits for."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby


@dataclass(frozen=True)
class Task:
    """An operator: what it needs for itself while it runs, and for how long; `bound` is what takes its time,
    `memory` for how much of it memory is busy."""

    name: str
    resources: tuple[str, ...]
    us: float
    bound: str
    memory: float = 0.0


@dataclass(frozen=True)
class _Block:
    """Tasks of one stream that ran behind each other on the same resources, and the block before which they
    could not."""

    tasks: tuple[Task, ...]
    end: float
    before: "_Block | None"


def critical_path(streams: Sequence[Sequence[Task]]) -> list[Task]:
    """Runs streams side by side and returns the tasks that the last one to end had to wait for, in time's
    order: each begins when the one before it ends, so that their times add up to the whole.

    A stream's tasks follow each other, and wait for their resources. What a stream does on the same resources
    without a break is not broken into. Whichever can start first does; of several the one that waits longest.
    """
    queues = [[tuple(run) for _, run in groupby(tasks, lambda t: t.resources)] for tasks in streams]
    at = [0] * len(queues)
    last: list[_Block | None] = [None] * len(queues)
    holder: dict[str, _Block] = {}

    def waits(s: int) -> list[_Block | None]:
        """What must end before the stream's next block begins."""
        return [last[s], *(holder.get(resource) for resource in queues[s][at[s]][0].resources)]

    def start(s: int) -> tuple[float, float]:
        return max(_end(block) for block in waits(s)), _end(last[s])

    while open_ := [s for s in range(len(queues)) if at[s] < len(queues[s])]:
        s = min(open_, key=start)
        before, run = max(waits(s), key=_end), queues[s][at[s]]
        block = _Block(run, _end(before) + sum(task.us for task in run), before)
        holder |= dict.fromkeys(run[0].resources, block)
        last[s] = block
        at[s] += 1
    path: list[Task] = []
    at_end = max(last, key=_end, default=None)
    while at_end is not None:
        path[:0] = at_end.tasks
        at_end = at_end.before
    return path


def _end(block: _Block | None) -> float:
    return block.end if block else 0.0
