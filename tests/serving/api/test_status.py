"""The state of a server: Prometheus's text, the status document, its page, the dashboard."""

import json
import re
from html.parser import HTMLParser
from importlib.resources import files

import pytest
from prometheus_client.parser import text_string_to_metric_families as families

API = files("cmx_jax") / "serving" / "api"
ASK = {"prompt": "The json module", "max_tokens": 8, "temperature": 0, "ignore_eos": True}


def scrape(server) -> dict[str, dict]:
    answer = server.http.get("/metrics").raise_for_status()
    return {
        sample.name: {"value": sample.value, "labels": sample.labels, "type": family.type}
        for family in families(answer.text)
        for sample in family.samples
    }


def test_metrics_counters(server) -> None:
    """Counters match the served tokens."""
    before, status = scrape(server), server.http.get("/status").json()
    usage = server.http.post("/v1/completions", json=ASK | {"n": 2}).json()["usage"]
    after = scrape(server)

    def grown(name: str) -> float:
        return after[name]["value"] - before[name]["value"]

    assert grown("cmx:prompt_tokens_total") == 2 * usage["prompt_tokens"]  # of each request
    assert grown("cmx:generation_tokens_total") == usage["completion_tokens"] == 16
    assert grown("cmx:time_to_first_token_seconds_count") == 2
    assert grown("cmx:e2e_request_latency_seconds_count") == 2
    assert 0 < grown("cmx:time_to_first_token_seconds_sum") <= grown("cmx:e2e_request_latency_seconds_sum")
    drafts, right = grown("cmx:mtp_draft_tokens_total"), grown("cmx:mtp_accepted_tokens_total")
    assert 0 <= right <= drafts
    # a turn gives a chunk: in the first one are the tokens of prefill and of a decode step; each decode step
    # gives a token and the right drafts, of which the last may exceed the limit
    steps = 2 + grown("cmx:inter_token_latency_seconds_count")
    assert 16 - 2 <= steps + right <= 16
    assert grown("cmx:engine_busy_seconds_total") >= grown("cmx:engine_step_seconds_total") > 0
    later = server.http.get("/status").json()
    assert later["finished"]["length"] == status["finished"]["length"] + 2
    assert later["generation_tokens"] == status["generation_tokens"] + 16


@pytest.mark.parametrize(
    ("name", "kind", "buckets"),
    [
        ("time_to_first_token_seconds", "histogram", (0.001, 2560.0, 22)),
        ("inter_token_latency_seconds", "histogram", (0.01, 80.0, 19)),
        ("e2e_request_latency_seconds", "histogram", (0.3, 7680.0, 21)),
        ("num_requests_running", "gauge", None),
        ("num_requests_waiting", "gauge", None),
        ("kv_cache_usage_perc", "gauge", None),
        ("prefix_cache_queries", "counter", None),
        ("prefix_cache_hits", "counter", None),
        ("request_success", "counter", None),
    ],
)
def test_metrics_names_and_buckets(server, name, kind, buckets) -> None:
    """Names and buckets are those of vLLM."""
    [family] = [f for f in families(server.http.get("/metrics").text) if f.name == f"cmx:{name}"]
    assert family.type == kind
    assert all(sample.labels["model_name"] == "tiny" for sample in family.samples)
    if buckets:
        ends = [float(s.labels["le"]) for s in family.samples if s.name.endswith("_bucket")]
        assert (ends[0], ends[-2], len(ends) - 1) == buckets


def test_metrics_gauges(server) -> None:
    """Gauges show running requests."""
    long = ASK | {"max_tokens": 500, "stream": True, "n": 3}
    with server.http.stream("POST", "/v1/completions", json=long) as answer:
        lines = answer.iter_lines()
        next(lines)
        now, status = scrape(server), server.http.get("/status").json()
        assert now["cmx:num_requests_running"]["value"] == status["running"] == 3
        assert 0 < now["cmx:kv_cache_usage_perc"]["value"] < 1
        [instance] = status["instances"]
        assert (instance["roles"], instance["npus"], instance["requests"]) == (["prefill", "decode"], 8, 3)
        assert 0 < instance["pages_used"] <= instance["pages"]
        assert next(line for line in lines if line)
    assert server.idle()
    assert scrape(server)["cmx:num_requests_running"]["value"] == 0


class Links(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def handle_starttag(self, tag: str, attrs: list) -> None:
        self.found += [value for name, value in attrs if name in ("src", "href", "action", "data")]


def test_status_page(server) -> None:
    """The page loads nothing from elsewhere, and reads only fields that the status has."""
    page = server.http.get("/").raise_for_status().text
    assert server.http.get("/").headers["content-type"].startswith("text/html")
    links = Links()
    links.feed(page)
    assert links.found == []
    assert set(re.findall(r"https?://[^\s\"]+", page)) == {"http://www.w3.org/2000/svg"}
    status = server.http.get("/status").json()
    assert set(re.findall(r"\bnow\.(\w+)", page)) - {"at"} <= set(status)
    assert set(re.findall(r"\bi\.(\w+)", page)) <= set(status["instances"][0])


def test_dashboard_metrics(server) -> None:
    """The dashboard queries only metrics that exist."""
    board = json.loads((API / "grafana.json").read_text())
    queried = {
        name
        for panel in board["panels"]
        for target in panel["targets"]
        for name in re.findall(r"cmx:\w+", target["expr"])
    }
    assert len(queried) > 10
    assert queried <= set(scrape(server))
    boxes = [tuple(panel["gridPos"].values()) for panel in board["panels"]]
    assert len(set(boxes)) == len(boxes)
