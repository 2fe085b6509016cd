"""The interface between the HTTP API and what serves requests: an engine here, or a router before workers."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol, TypeVar, runtime_checkable

from cmx_jax.errors import CmxError
from cmx_jax.serving.deploy.site import NpuRange
from cmx_jax.serving.engine.timeline import TraceEvent
from cmx_jax.serving.kv.prefix_cache import PrefixCacheStats
from cmx_jax.serving.scheduling.request import SamplingParams, TokenLogprob
from cmx_jax.serving.service.counters import EngineCounters, InstanceLoad, WorkerLoad
from cmx_jax.serving.service.generation import Chunk, Generation

T = TypeVar("T")
RETRY_AFTER_S = 5.0
"""Seconds after which a client that gets `Unavailable` may ask again."""


class Unavailable(CmxError):
    """No request is taken: the service drains or is broken, or no worker answers."""


@runtime_checkable
class Frontend(Protocol):
    """Serves requests: `Service` with an engine, `Router` with workers in other processes.

    Attributes:
      live: Requests that are not finished.
      draining: True while new requests are refused.
      broken: Reason why no request can be served at the moment, or None.
      watchers: Functions that get each chunk of an answer, on the event loop.
    """

    live: Any
    draining: bool
    watchers: list[Callable[[Chunk], None]]

    @property
    def broken(self) -> str | None: ...

    async def start(self) -> None:
        """Starts serving; chunks come to the running event loop."""
        ...

    async def generate(
        self,
        requests: Sequence[tuple[list[int], SamplingParams]],
        *,
        priority: int = 0,
        namespace: str = "",
    ) -> Generation:
        """Submits prompts of token ids, all or none.

        Args:
          requests: Token ids of each prompt, and its sampling parameters.
          priority: Priority of the requests; smaller numbers go first.
          namespace: Namespace of the caching pool.

        Raises:
          Unavailable: No request is taken now.
          Overloaded: A queue is full.
          CmxError: One of them cannot be served.
        """
        ...

    async def score(self, prompts: Sequence[Sequence[int]], top: int) -> list[list[TokenLogprob | None]]:
        """Returns the log-probability of each token of prompts, with the `top` most likely tokens beside it.

        Raises:
          Unavailable: Nothing is served any more.
          CmxError: A prompt exceeds the model's context.
        """
        ...

    def cancel(self, generation: Generation, indices: set[int], reason: str) -> None:
        """Ends requests of a generation, with `reason` as their finish reason."""
        ...

    async def call(self, function: Callable[[], T]) -> T:
        """Returns the result of a function that is called between two steps.

        Raises:
          Unavailable: Nothing is served any more.
        """
        ...

    async def drain(self, timeout_s: float) -> None:
        """Takes no new request, waits up to `timeout_s` seconds for those that run, then ends them."""
        ...

    async def close(self) -> None:
        """Stops after the step that runs, and releases what was held."""
        ...

    async def timelines(self) -> list[list[TraceEvent]]:
        """Returns the events of each process, for `timeline.together`."""
        ...

    def counters(self) -> EngineCounters:
        """Returns counters and gauges for metrics."""
        ...

    def cache(self) -> PrefixCacheStats | None:
        """Returns the statistics of the caching pool, or None if there is none."""
        ...

    def workers(self) -> list[WorkerLoad]:
        """Returns the load of each worker; an empty list if requests are served in this process."""
        ...

    def instances(self, npus: Mapping[str, NpuRange]) -> list[InstanceLoad]:
        """Returns the load of each instance.

        Args:
          npus: NPUs of each instance, by its name.
        """
        ...
