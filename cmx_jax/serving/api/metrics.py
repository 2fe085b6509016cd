"""Prometheus metrics: vLLM's suffixes and buckets under `cmx:`.

With MTP a step gives several tokens at once: the inter-token latency is the gap between steps' chunks.
"""

from collections.abc import Iterable, Iterator
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from cmx_jax.serving.api.context import ApiContext
from cmx_jax.serving.service.generation import Chunk

TTFT = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0)
ITL = (0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0)
E2E = (0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0, 120.0, 240.0)
LONG = (40.0, 80.0)
LABEL = ("model_name",)


class Metrics:
    """Counts chunks as they come; reads gauges when it is scraped.

    Attributes:
      registry: of its own, so that several may live in one process.
    """

    def __init__(self, served: ApiContext):
        self.registry, self._name = CollectorRegistry(), served.name
        name = self._name

        def histogram(suffix: str, about: str, buckets: tuple[float, ...]) -> Histogram:
            made = Histogram(f"cmx:{suffix}", about, LABEL, buckets=buckets, registry=self.registry)
            return made.labels(name)

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
        self.registry.register(_Now(served))

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

    def totals(self) -> dict[str, Any]:
        """Counters for the status page."""

        def total(suffix: str, **labels: str) -> int:
            found = self.registry.get_sample_value(
                f"cmx:{suffix}_total", {"model_name": self._name, **labels}
            )
            return int(found or 0)

        return {
            "prompt_tokens": total("prompt_tokens"),
            "generation_tokens": total("generation_tokens"),
            "finished": {reason: total("request_success", finished_reason=reason) for reason in self._ended},
        }


class _Now(Collector):
    """What is true at the moment of a scrape."""

    def __init__(self, served: ApiContext):
        self._served = served

    def collect(self) -> Iterator[Metric]:
        served, now = self._served, self._served.service.counts()
        gauges = (
            ("num_requests_running", "Requests that have pages.", now["running"]),
            ("num_requests_waiting", "Requests that have none yet.", now["waiting"]),
            ("kv_cache_usage_perc", "Pages in use, 1 is all.", now["kv_cache_usage"]),
        )
        counters = (
            ("prefix_cache_queries", "Prompt tokens that were looked up.", now["prefix_queries"]),
            ("prefix_cache_hits", "Prompt tokens that came out of the caching pool.", now["prefix_hits"]),
            ("engine_busy_seconds", "Time while there was work.", now["busy_s"]),
            ("engine_step_seconds", "Of that, the time in which a program ran.", now["step_s"]),
            ("mtp_draft_tokens", "Drafts that decode steps verified.", now["drafts"]),
            ("mtp_accepted_tokens", "Drafts that were right.", now["accepted"]),
            ("num_preemptions", "Requests that lost their pages to more urgent ones.", now["preemptions"]),
            ("pd_transfers", "Prompts whose pages came to decode.", now["kv_moved"]),
            ("pd_transfers_lost", "Prompts whose pages did not.", now["kv_lost"]),
            ("eplb_rebalances", "Times that experts were placed anew.", now["eplb_moves"]),
        )
        yield from _families(GaugeMetricFamily, served.name, gauges)
        yield from _families(CounterMetricFamily, served.name, counters)
        yield from _pool(served.name, served.service.cache())


def _pool(name: str, stats: dict[str, Any]) -> Iterator[Metric]:
    """Of the caching pool: what this process asked for, and what became of it."""
    if not stats:
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
    """A metric for each row: suffix, what it is, and its value for the model of that name."""
    for suffix, about, value in rows:
        family = kind(f"cmx:{suffix}", about, labels=LABEL)
        family.add_metric([name], value)
        yield family
