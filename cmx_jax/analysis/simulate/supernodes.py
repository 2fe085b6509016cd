"""Supernodes behind one router, and the loop over all that happens in them."""

from array import array
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np

from cmx_jax.analysis.simulate.deployment import Deployment
from cmx_jax.analysis.simulate.events import Events
from cmx_jax.analysis.simulate.simulator import Supernode
from cmx_jax.analysis.simulate.times import StepTimes
from cmx_jax.analysis.simulate.virtual import Job
from cmx_jax.analysis.simulate.workload import Arrival
from cmx_jax.errors import CmxError

Route = Callable[[list[Supernode], Job, int], Supernode]

# Which supernode takes a request, the n-th.
ROUTERS: dict[str, Route] = {
    "least-loaded": lambda nodes, job, n: min(nodes, key=lambda node: node.outstanding),
    "round-robin": lambda nodes, job, n: nodes[n % len(nodes)],
    "prefix": lambda nodes, job, n: max(
        nodes, key=lambda node: (node.prefix.match(job.blocks), -node.outstanding)
    ),
}

COLUMNS = ("arrived", "started", "first_token", "finished", "prompt", "output", "cached")


@dataclass(frozen=True)
class Outcome:
    """What became of all requests: `columns` (see `COLUMNS`) by request in the order in which they finished,
    seconds and tokens; and the supernodes as they were left."""

    columns: dict[str, np.ndarray]
    nodes: list[Supernode]
    deployment: Deployment


def simulate(
    arrivals: Iterable[Arrival],
    deployment: Deployment,
    times: StepTimes,
    *,
    supernodes: int = 1,
    router: str = "least-loaded",
) -> Outcome:
    """Serves all arrivals (in order of time) until the last one is finished.

    Raises:
      CmxError: no such router, no supernode, no request, or one that is larger than a cache.
    """
    if router not in ROUTERS:
        raise CmxError(f"router {router!r} is unknown, expected one of {list(ROUTERS)}")
    if supernodes < 1:
        raise CmxError(f"supernodes is {supernodes}, expected at least 1")
    events, rows = Events(), array("d")

    def done(job: Job) -> None:
        ends: tuple[Any, ...] = (job.arrived, job.started, job.first_token, job.finished)
        rows.extend((*ends, len(job.prompt), job.params.max_tokens, job.cached))

    nodes = [Supernode(deployment, times, events, done) for _ in range(supernodes)]
    taken = _run(iter(arrivals), nodes, events, ROUTERS[router])
    table = np.array(rows).reshape(-1, len(COLUMNS))
    if not taken:
        raise CmxError("no request arrives: give a longer duration, or a higher rate")
    if len(table) != taken:
        raise RuntimeError(f"{taken} requests arrived, {len(table)} finished")
    return Outcome(dict(zip(COLUMNS, table.T, strict=True)), nodes, deployment)


def _run(arrivals: Iterable[Arrival], nodes: list[Supernode], events: Events, route: Route) -> int:
    """Events and arrivals in order of time, events first; returns how many arrived."""
    taken = 0
    for taken, arrival in enumerate(arrivals, 1):
        while events.heap and events.heap[0][0] <= arrival.time:
            events.next()
        events.now = arrival.time
        job = Job.of(arrival)
        node = nodes[0] if len(nodes) == 1 else route(nodes, job, taken)
        node.submit(job)
    while events.heap:
        events.next()
    return taken
