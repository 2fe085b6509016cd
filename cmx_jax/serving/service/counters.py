"""Counters of an engine for metrics, and the load of its instances and workers for status pages."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields

from cmx_jax.serving.deploy.site import NpuRange
from cmx_jax.serving.engine.engine import Engine


@dataclass(frozen=True, kw_only=True)
class EngineCounters:
    """Counters and gauges of an engine, or the sums over the engines of several workers.

    Attributes:
      waiting: Number of requests that have no pages yet.
      transfers: Number of prompts whose pages are being fetched.
      running: Number of requests that have pages.
      kv_cache_usage: Part of the pages that is in use, 1 is all.
      prefix_queries: Number of prompt tokens that were looked up in the caching pool.
      prefix_hits: Number of these tokens that the pool held.
      drafts: Number of MTP drafts that decode steps verified.
      accepted: Number of MTP drafts that were accepted.
      busy_s: Seconds with work, in steps and between them.
      step_s: Seconds of these in which a program ran.
      steps: Number of turns of the engine in which a program ran.
      preemptions: Number of times that a request lost its pages to a more urgent one.
      kv_moved: Number of prompts whose pages were moved to decode.
      kv_lost: Number of prompts whose pages did not reach decode.
      eplb_moves: Number of times that experts were placed again.
      retried: Number of times that a router tried a request again.
    """

    waiting: int = 0
    transfers: int = 0
    running: int = 0
    kv_cache_usage: float = 0.0
    prefix_queries: int = 0
    prefix_hits: int = 0
    drafts: int = 0
    accepted: int = 0
    busy_s: float = 0.0
    step_s: float = 0.0
    steps: int = 0
    preemptions: int = 0
    kv_moved: int = 0
    kv_lost: int = 0
    eplb_moves: int = 0
    retried: int = 0

    @classmethod
    def from_engine(cls, engine: Engine, busy_s: float) -> "EngineCounters":
        """Returns counters and gauges of an engine.

        They may be read while the engine runs: each is right, but they may be a step apart.

        Args:
          engine: The engine.
          busy_s: Seconds in which the engine had work.
        """
        instances, context = engine.instances, engine.mover.context
        traffic = [i.traffic for i in engine.decoders]
        pages = sum(i.capacity.pages * i.allocator.ranks for i in instances)
        return cls(
            waiting=len(engine.waiting),
            transfers=len(engine.scheduler.transfers),
            running=sum(len(i.allocator.places) for i in instances),
            kv_cache_usage=sum(i.allocator.load for i in instances) / pages,
            prefix_queries=context.queries if context else 0,
            prefix_hits=context.hits if context else 0,
            drafts=sum(int(t.proposed.sum()) for t in traffic),
            accepted=sum(int(t.accepted.sum()) for t in traffic),
            busy_s=busy_s,
            step_s=engine.step_s,
            steps=engine.steps,
            preemptions=engine.scheduler.preempted,
            kv_moved=engine.outbox.counts["acknowledged"],
            kv_lost=engine.mover.lost + engine.outbox.counts["expired"],
            eplb_moves=len(engine.moves),
        )


@dataclass(frozen=True, kw_only=True)
class InstanceLoad:
    """Roles and load of an instance.

    Attributes:
      name: Name of the instance.
      roles: Roles of the instance: `prefill`, `decode` or both.
      first_npu: Number of the instance's first NPU.
      npus: Number of its NPUs.
      requests: Number of requests that have pages on the instance.
      prefilling: Number of these requests whose prompt is not finished.
      pages_used: Number of pages in use.
      pages: Number of pages.
    """

    name: str
    roles: list[str]
    first_npu: int
    npus: int
    requests: int
    prefilling: int
    pages_used: int
    pages: int

    @classmethod
    def from_engine(cls, engine: Engine, npus: Mapping[str, NpuRange]) -> "list[InstanceLoad]":
        """Returns the roles and the load of each instance.

        Args:
          engine: Engine of the instances.
          npus: NPUs of each instance, by its name.
        """
        roles = {"prefill": engine.prefill, "decode": engine.decoders}
        return [
            cls(
                name=i.name,
                roles=[role for role, instances in roles.items() if i in instances],
                first_npu=npus[i.name].first,
                npus=npus[i.name].size,
                requests=len(i.allocator.places),
                prefilling=len(i.allocator.prefilling),
                pages_used=i.allocator.load,
                pages=i.capacity.pages * i.allocator.ranks,
            )
            for i in engine.instances
        ]


@dataclass(frozen=True, kw_only=True)
class WorkerLoad:
    """Health and load of a worker, as its router sees it.

    Attributes:
      role: Role of the worker, `prefill` or `decode`.
      url: URL of the worker.
      load: Number of tokens of the unfinished requests that this router has sent to the worker.
      error: Reason why the worker gets no request, or None.
    """

    role: str
    url: str
    load: int
    error: str | None


def sum_counters(counters: Iterable[EngineCounters], kv_cache_usage: float) -> EngineCounters:
    """Returns the sum of each counter, with the given `kv_cache_usage`, which cannot be summed."""
    rows = list(counters)
    sums = {field.name: sum(getattr(row, field.name) for row in rows) for field in fields(EngineCounters)}
    return EngineCounters(**{**sums, "kv_cache_usage": kv_cache_usage})
