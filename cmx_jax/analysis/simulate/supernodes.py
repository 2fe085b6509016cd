"""Simulated supernodes that share one router, and the event loop."""

from array import array
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np

from cmx_jax.analysis.simulate.events import Events
from cmx_jax.analysis.simulate.simulated_deployment import SimulatedDeployment
from cmx_jax.analysis.simulate.simulator import SimSupernode
from cmx_jax.analysis.simulate.times import StepTimes
from cmx_jax.analysis.simulate.virtual import SimRequest
from cmx_jax.analysis.simulate.workload import Arrival
from cmx_jax.errors import CmxError

Route = Callable[[list[SimSupernode], SimRequest, int], SimSupernode]

# Functions that choose a supernode for a request, the n-th.
ROUTERS: dict[str, Route] = {
    "least-loaded": lambda nodes, job, n: min(nodes, key=lambda node: node.outstanding),
    "round-robin": lambda nodes, job, n: nodes[n % len(nodes)],
    "prefix": lambda nodes, job, n: max(
        nodes, key=lambda node: (node.prefix.match(job.blocks), -node.outstanding)
    ),
}

COLUMNS = ("arrived", "started", "first_token", "finished", "prompt", "output", "cached")


@dataclass(frozen=True)
class SimulationOutcome:
    """Times and sizes of all requests.

    Attributes:
      columns: Arrays by the names in `COLUMNS`, in seconds and tokens; requests in the order of their ends.
      nodes: Supernodes in their final state.
      deployment: Configuration of each supernode.
    """

    columns: dict[str, np.ndarray]
    nodes: list[SimSupernode]
    deployment: SimulatedDeployment


def simulate(
    arrivals: Iterable[Arrival],
    deployment: SimulatedDeployment,
    times: StepTimes,
    *,
    supernodes: int = 1,
    router: str = "least-loaded",
) -> SimulationOutcome:
    """Serves all requests until the last one is finished.

    Args:
      arrivals: Requests in order of time.
      deployment: Configuration of each supernode.
      times: Seconds of steps and transfers.
      supernodes: Number of supernodes.
      router: Name of one of `ROUTERS`.

    Raises:
      CmxError: The router is unknown, there is no supernode or no request, or a request exceeds a cache.
    """
    if router not in ROUTERS:
        raise CmxError(f"router {router!r} is unknown, expected one of {list(ROUTERS)}")
    if supernodes < 1:
        raise CmxError(f"supernodes is {supernodes}, expected at least 1")
    events, rows = Events(), array("d")

    def done(job: SimRequest) -> None:
        times: tuple[Any, ...] = (job.arrived, job.started, job.first_token, job.finished)
        rows.extend((*times, len(job.prompt), job.params.max_tokens, job.cached))

    nodes = [SimSupernode(deployment, times, events, done) for _ in range(supernodes)]
    arrived = _run(iter(arrivals), nodes, events, ROUTERS[router])
    table = np.array(rows).reshape(-1, len(COLUMNS))
    if not arrived:
        raise CmxError("no request arrives: give a longer duration, or a higher rate")
    if len(table) != arrived:
        raise RuntimeError(f"{arrived} requests arrived, {len(table)} finished")
    return SimulationOutcome(dict(zip(COLUMNS, table.T, strict=True)), nodes, deployment)


def _run(arrivals: Iterable[Arrival], nodes: list[SimSupernode], events: Events, route: Route) -> int:
    """Runs events and arrivals in order of time, events first; returns the number of requests."""
    arrived = 0
    for arrived, arrival in enumerate(arrivals, 1):
        while events.heap and events.heap[0][0] <= arrival.time:
            events.next()
        events.now = arrival.time
        job = SimRequest.of(arrival)
        node = nodes[0] if len(nodes) == 1 else route(nodes, job, arrived)
        node.submit(job)
    while events.heap:
        events.next()
    return arrived
