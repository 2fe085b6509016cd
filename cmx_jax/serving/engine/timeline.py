"""Events of requests and instances, for ui.perfetto.dev (the JSON form of trace events).

Each request has a track with its states, each instance a track with its steps, and an arrow shows where pages
move. Times are wall-clock times, so that timelines of several processes fit together.
"""

import itertools
import time
from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from cmx_jax.serving.scheduling.request import Request, State

TraceEvent = dict[str, Any]
"""An event in Perfetto's JSON form; its fields depend on its phase, `ph`."""

EVENTS = 100_000  # largest number of events kept; older ones are dropped
REQUESTS = 1  # process id, in Perfetto's terms, of the requests' tracks


class Timeline:
    """The newest events of one engine.

    Attributes:
      name: Name of the process.
    """

    def __init__(self, name: str = "engine", events: int = EVENTS):
        self.name = name
        self._events: deque[TraceEvent] = deque(maxlen=events)
        self._since: dict[Request, tuple[float, str, dict[str, object]]] = {}
        self._pids: dict[str, int] = {}
        self._arrows = itertools.count(1)

    def on_change(self, request: Request, state: State, instance: Any) -> None:
        """Notes that a request has entered a state, on an instance or None; see `Scheduler.subscribe`."""
        if state is State.FINISHED:
            self.ends(request)
            return
        about: dict[str, object] = {} if instance is None else {"instance": instance.name}
        if state is State.WAITING and request.preemptions:
            about["preempted"] = request.preemptions
        self.enters(request, state.value, **about)

    def enters(self, request: Request, state: str, **about: Any) -> None:
        """Begins a stretch of a request's track, and ends the one before.

        Args:
          request: The request.
          state: Name of the stretch: a state of the request, or what it waits for.
          about: Further values to show with it.
        """
        now = _now()
        self._leaves(request, now)
        if request.state is not State.FINISHED:
            self._since[request] = now, state, about

    def _leaves(self, request: Request, now: float) -> None:
        began, state, about = self._since.pop(request, (now, "", {}))
        if state:
            args = {"prompt": len(request.prompt), "tokens": len(request.tokens), **about}
            self._add("X", REQUESTS, request.id, state, began, dur=now - began, args=args)

    def ends(self, request: Request) -> None:
        """Ends the track of a finished request."""
        now = _now()
        self._leaves(request, now)
        args = {"reason": request.finish_reason, "error": request.error}
        self._add("i", REQUESTS, request.id, f"finished: {request.finish_reason}", now, s="t", args=args)

    def forget(self) -> None:
        """Forgets all requests, as after a step that was broken off."""
        self._since.clear()

    @contextmanager
    def step(self, instance: str, kind: str, **about: Any) -> Iterator[None]:
        """Records a step of an instance, which is the block of the `with` statement.

        Args:
          instance: Name of the instance.
          kind: `prefill` or `decode`.
          about: Further values to show with it.
        """
        began = _now()
        yield
        self._add("X", self._pid(instance), 1, kind, began, dur=_now() - began, args=about)

    def moved(self, request: Request, source: str, target: str, pages: int) -> None:
        """Records that pages moved from one instance to another."""
        now, arrow = _now(), next(self._arrows)
        args = {"request": request.id, "pages": pages}
        for phase, instance in (("s", source), ("f", target)):
            pid = self._pid(instance)
            self._add("X", pid, 1, "pages", now, dur=1.0, args=args)
            self._add(phase, pid, 1, "pages", now, id=arrow, cat="kv", bp="e")

    def _pid(self, instance: str) -> int:
        return self._pids.setdefault(instance, len(self._pids) + REQUESTS + 1)

    def _add(self, ph: str, pid: int, tid: int, name: str, ts: float, **fields: Any) -> None:
        self._events.append(
            {"ph": ph, "pid": pid, "tid": tid, "name": name, "ts": ts, "cat": "cmx", **fields}
        )

    def events(self) -> list[TraceEvent]:
        """Returns all events, and the names of the tracks."""
        pids = {REQUESTS: f"{self.name}: requests"} | {
            pid: f"{self.name}: {instance}" for instance, pid in self._pids.items()
        }
        events = list(self._events)
        tracks = sorted({e["tid"] for e in events if e["pid"] == REQUESTS})
        names = [_meta("process_name", pid, 0, name) for pid, name in pids.items()]
        names += [_meta("thread_name", REQUESTS, tid, f"request {tid}") for tid in tracks]
        return names + events


def together(timelines: Iterable[list[TraceEvent]]) -> dict[str, object]:
    """Merges the timelines of several processes into one document."""
    events = []
    for n, timeline in enumerate(timelines):
        events += [{**event, "pid": event["pid"] + 1000 * n} for event in timeline]
    return {"traceEvents": events, "displayTimeUnit": "ms"}


def _meta(kind: str, pid: int, tid: int, name: str) -> TraceEvent:
    return {"ph": "M", "pid": pid, "tid": tid, "name": kind, "args": {"name": name}}


def _now() -> float:
    """Returns the wall-clock time in microseconds."""
    return time.time() * 1e6
