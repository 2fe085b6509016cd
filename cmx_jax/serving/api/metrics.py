"""Prometheus metrics: vLLM's suffixes and buckets under `cmx:`.

With MTP, a step yields several tokens at once: the inter-token latency is the gap between the steps' chunks.
"""

from collections.abc import Iterable, Iterator
from typing import Any, TypedDict

from prometheus_client import CollectorRegistry, Counter, Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from cmx_jax.serving.api.context import ApiContext
from cmx_jax.serving.kv.prefix_cache import PrefixCacheStats
from cmx_jax.serving.service.generation import Chunk

TTFT = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0)
ITL = (0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0)
E2E = (0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0, 120.0, 240.0)
LONG = (40.0, 80.0)
LABEL = ("model_name",)


class Totals(TypedDict):
    """Counters for the status page.

    Attributes:
      prompt_tokens: Number of prompt tokens of requests that began to answer.
      generation_tokens: Number of generated tokens.
      finished: Number of finished requests, by finish reason.
    """

    prompt_tokens: int
    generation_tokens: int
    finished: dict[str, int]


class Metrics:
    """Counts chunks when they are made; reads gauges at each scrape.

    Attributes:
      registry: Registry of these metrics alone, so that one process may have several.
    """

    def __init__(self, context: ApiContext):
        self.registry, self._name = CollectorRegistry(), context.name
        name = self._name

        def histogram(suffix: str, about: str, buckets: tuple[float, ...]) -> Histogram:
            metric = Histogram(f"cmx:{suffix}", about, LABEL, buckets=buckets, registry=self.registry)
            return metric.labels(name)

        def counter(suffix: str, about: str) -> Counter:
            return Counter(f"cmx:{suffix}", about, LABEL, registry=self.registry).labels(name)

        self._ttft = histogram(
            "time_to_first_token_seconds",
            "From arrival to the first token.",
            (*TTFT, *LONG, 160.0, 640.0, 2560.0),
        )
        self._itl = histogram(
            "inter_token_latency_seconds", "Between two chunks of a request.", (*ITL, *LONG)
        )
        self._e2e = histogram(
            "e2e_request_latency_seconds",
            "From arrival to the last token.",
            (*E2E, 480.0, 960.0, 1920.0, 7680.0),
        )
        self._prompt = counter("prompt_tokens", "Prompt tokens of requests that began to answer.")
        self._generated = counter("generation_tokens", "Generated tokens.")
        labels = (*LABEL, "finished_reason")
        ended = Counter("cmx:request_success", "Requests by how they ended.", labels, registry=self.registry)
        self._ended = {reason: ended.labels(name, reason) for reason in ("stop", "length", "abort", "error")}
        self.registry.register(_ServiceCollector(context))

    def watch(self, chunk: Chunk) -> None:
        """Counts a chunk."""
        if chunk.first:
            self._ttft.observe(chunk.age_s)
            self._prompt.inc(len(chunk.request.prompt))
        elif chunk.tokens:
            self._itl.observe(chunk.gap_s)
        self._generated.inc(len(chunk.tokens))
        if chunk.finish_reason is not None:
            self._e2e.observe(chunk.age_s)
            self._ended[chunk.finish_reason].inc()

    def totals(self) -> Totals:
        """Returns counters for the status page."""

        def total(suffix: str, **labels: str) -> int:
            value = self.registry.get_sample_value(
                f"cmx:{suffix}_total", {"model_name": self._name, **labels}
            )
            return int(value or 0)

        return {
            "prompt_tokens": total("prompt_tokens"),
            "generation_tokens": total("generation_tokens"),
            "finished": {reason: total("request_success", finished_reason=reason) for reason in self._ended},
        }


class _ServiceCollector(Collector):
    """Reads the service's counters and gauges at each scrape."""

    def __init__(self, context: ApiContext):
        self._context = context

    def collect(self) -> Iterator[Metric]:
        context, now = self._context, self._context.service.counters()
        gauges = (
            ("num_requests_running", "Requests that have pages.", now.running),
            ("num_requests_waiting", "Requests that have none yet.", now.waiting),
            ("kv_cache_usage_perc", "Pages in use, 1 is all.", now.kv_cache_usage),
        )
        counters = (
            ("prefix_cache_queries", "Prompt tokens that were looked up.", now.prefix_queries),
            ("prefix_cache_hits", "Prompt tokens that came out of the caching pool.", now.prefix_hits),
            ("engine_busy_seconds", "Time while there was work.", now.busy_s),
            ("engine_step_seconds", "Of that, the time in which a program ran.", now.step_s),
            ("mtp_draft_tokens", "Drafts that decode steps verified.", now.drafts),
            ("mtp_accepted_tokens", "Drafts that were right.", now.accepted),
            ("num_preemptions", "Requests that lost their pages to more urgent ones.", now.preemptions),
            ("pd_transfers", "Prompts whose pages were moved to decode.", now.kv_moved),
            ("pd_transfers_lost", "Prompts whose pages did not reach decode.", now.kv_lost),
            ("eplb_rebalances", "Times that experts were placed again.", now.eplb_moves),
        )
        yield from _families(GaugeMetricFamily, context.name, gauges)
        yield from _families(CounterMetricFamily, context.name, counters)
        yield from _pool(context.name, context.service.cache())


def _pool(name: str, stats: PrefixCacheStats | None) -> Iterator[Metric]:
    """Yields the metrics of the caching pool, as this process sees it."""
    if stats is None:
        return
    hits = CounterMetricFamily("cmx:ems_hits", "Blocks found, by tier.", labels=(*LABEL, "tier"))
    for tier, count in {"dram": 0, "disk": 0, **stats["hits"]}.items():
        hits.add_metric([name, tier], count)
    yield hits
    bad = sum(server.get("bad", 0) for server in stats["servers"].values())
    down = sum("misses" not in server for server in stats["servers"].values())
    counters = (
        ("ems_misses", "Blocks not found.", stats["misses"]),
        ("ems_stored", "Blocks stored.", stats["stored"]),
        ("ems_dropped", "Blocks not stored, as too many waited.", stats["dropped"]),
        ("ems_refused", "Blocks that a server did not take.", stats["lost"]),
        ("ems_failures", "Times that a server did not answer.", stats["failures"]),
        ("ems_bad_blocks", "Blocks that were damaged.", bad),
    )
    yield from _families(CounterMetricFamily, name, counters)
    servers = (("ems_servers_down", "Cache servers that do not answer.", down),)
    yield from _families(GaugeMetricFamily, name, servers)


def _families(kind: Any, name: str, rows: Iterable[tuple[str, str, float]]) -> Iterator[Metric]:
    """Yields a metric for each row of suffix, description and value, labelled with the model's name."""
    for suffix, about, value in rows:
        family = kind(f"cmx:{suffix}", about, labels=LABEL)
        family.add_metric([name], value)
        yield family
