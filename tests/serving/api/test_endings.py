"""Every way in which a request ends before its time; nothing of it is left in the engine."""

import json
import threading
import time
from collections.abc import Iterator

import httpx
import openai
import pytest
from serving.api.running import Running, serving

from cmx_jax.serving.scheduling.waiting import QueueLimits

LONG = {"model": "tiny", "prompt": "The", "max_tokens": 500, "temperature": 0, "ignore_eos": True}
SHORT = LONG | {"max_tokens": 4}


@pytest.fixture(scope="module")
def server(deployment) -> Iterator[Running]:
    with serving(deployment, admin_keys=["root"]) as running:
        assert running.http.post("/v1/completions", json=SHORT).status_code == 200  # compiles
        yield running


def ended(server: Running, reason: str) -> int:
    return server.http.get("/status").json()["finished"][reason]


def requests(server: Running) -> list[dict]:
    answer = server.http.get("/admin/requests", headers={"Authorization": "Bearer root"})
    return answer.json()["requests"]


def until(condition) -> None:
    end = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


@pytest.mark.parametrize("n", [1, 3])
def test_a_client_that_leaves_a_stream_ends_its_requests(server, n) -> None:
    before = ended(server, "abort")
    with server.http.stream("POST", "/v1/completions", json=LONG | {"stream": True, "n": n}) as answer:
        lines = answer.iter_lines()  # which leaves when it is forgotten
        assert next(lines).startswith("data: {")
        assert len(requests(server)) == n
    assert server.idle()
    assert ended(server, "abort") == before + n


def test_a_client_that_leaves_an_answer_ends_it(server) -> None:
    before = ended(server, "abort")
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(f"{server.url}/v1/completions", json=LONG, timeout=0.3)
    assert server.idle()
    assert ended(server, "abort") == before + 1


def test_a_client_that_leaves_the_queue_is_forgotten_and_others_go_on(server) -> None:
    """Forty choices are more than there are rows: the last ones wait."""
    before = ended(server, "abort")
    with server.http.stream("POST", "/v1/completions", json=LONG | {"stream": True, "n": 32}) as answer:
        lines = answer.iter_lines()
        next(lines)
        with pytest.raises(httpx.ReadTimeout):
            httpx.post(f"{server.url}/v1/completions", json=SHORT, timeout=0.3)
        until(lambda: len(requests(server)) == 32)
        assert ended(server, "abort") == before + 1
        next(line for line in lines if line)
    assert server.idle()


def test_a_full_queue_is_429_and_says_when_to_come_again(server, monkeypatch) -> None:
    engine = server.served.deployment.engine
    with server.http.stream("POST", "/v1/completions", json=LONG | {"stream": True, "n": 33}) as answer:
        lines = answer.iter_lines()
        next(lines)
        monkeypatch.setattr(engine, "limits", QueueLimits(max_num_queued_reqs=1))
        refused = server.http.post("/v1/completions", json=SHORT)
        assert refused.status_code == 429
        assert int(refused.headers["Retry-After"]) >= 1
        assert refused.json()["error"]["type"] == "rate_limit_error"
        with pytest.raises(openai.RateLimitError, match="the queue is full"):
            server.openai.completions.create(model="tiny", prompt="x")
        next(line for line in lines if line)  # the stream goes on
    assert server.idle()


def test_prompts_of_a_refused_call_are_not_served_in_part(server, monkeypatch) -> None:
    engine = server.served.deployment.engine
    monkeypatch.setattr(engine, "limits", QueueLimits(max_num_queued_reqs=2))
    refused = server.http.post("/v1/completions", json=LONG | {"n": 5})
    assert refused.status_code == 429
    assert not engine.busy


def test_who_waits_too_long_gets_an_error(server, monkeypatch) -> None:
    engine = server.served.deployment.engine
    with server.http.stream("POST", "/v1/completions", json=LONG | {"stream": True, "n": 32}) as answer:
        lines = answer.iter_lines()
        next(lines)
        monkeypatch.setattr(engine, "limits", QueueLimits(queue_ttl_s=0.05))
        late = server.http.post("/v1/completions", json=SHORT)
        assert late.status_code == 503
        assert "waited longer than 0.05 s" in late.json()["error"]["message"]
        next(line for line in lines if line)  # the stream goes on
    assert server.idle()


@pytest.mark.parametrize("stage", ["prefill", "start_decode"])
def test_a_step_that_fails_ends_its_requests_with_an_error_and_no_others(server, monkeypatch, stage) -> None:
    instance = server.served.deployment.engine.decode
    expected = server.http.post("/v1/completions", json=SHORT).json()["choices"]
    before = ended(server, "error")
    failed = threading.Event()

    def fail(*_: object) -> None:
        failed.set()
        monkeypatch.undo()
        raise RuntimeError("the device is gone")

    monkeypatch.setattr(instance, stage, fail)
    answer = server.http.post("/v1/completions", json=SHORT | {"n": 2})
    assert failed.is_set()
    assert answer.status_code == 500
    assert "a step of the engine failed (RuntimeError)" in answer.json()["error"]["message"]
    assert server.idle()
    assert ended(server, "error") == before + 2
    assert server.http.post("/v1/completions", json=SHORT).json()["choices"] == expected


def test_a_stream_that_fails_says_so(server, monkeypatch) -> None:
    instance = server.served.deployment.engine.decode
    events = server.openai.completions.create(
        model="tiny", prompt="The", max_tokens=500, stream=True, extra_body={"ignore_eos": True}
    )
    next(events)

    def fail(*_: object) -> None:
        monkeypatch.undo()
        raise RuntimeError("the device is gone")

    monkeypatch.setattr(instance, "start_decode", fail)
    with pytest.raises(openai.APIError, match="a step of the engine failed"):
        list(events)
    assert server.idle()


def test_a_failure_of_the_server_itself_is_500_in_one_line(server, monkeypatch) -> None:
    monkeypatch.setattr(type(server.served), "check", lambda *_: 1 / 0)
    answer = server.http.post("/v1/completions", json=SHORT)
    assert answer.status_code == 500
    assert answer.json()["error"]["message"] == "the server failed to answer: its log says why"


def test_an_engine_that_cannot_be_reset_is_not_healthy(deployment, monkeypatch) -> None:
    with serving(deployment) as running:

        def fail(*_: object) -> None:
            raise RuntimeError("the device is gone")

        with monkeypatch.context() as patch:
            patch.setattr(deployment.engine, "reset", fail)
            patch.setattr(deployment.engine.decode, "prefill", fail)
            assert running.http.post("/v1/completions", json=SHORT).status_code == 500
            until(lambda: running.http.get("/health").status_code == 503)
        refused = running.http.post("/v1/completions", json=SHORT)
        assert refused.status_code == 503
        assert "restart the server" in refused.json()["error"]["message"]
    deployment.engine.reset()


def test_a_server_that_drains_finishes_what_runs_and_takes_nothing_new(deployment) -> None:
    with serving(deployment, admin_keys=["root"]) as running:
        ask = LONG | {"stream": True, "max_tokens": 60}
        with running.http.stream("POST", "/v1/completions", json=ask) as answer:
            lines = answer.iter_lines()
            next(lines)
            told = running.http.post("/admin/drain", headers={"Authorization": "Bearer root"})
            assert told.json() == {"status": "draining", "running": 1}
            assert running.http.get("/health").status_code == 503
            refused = running.http.post("/v1/completions", json=SHORT)
            assert refused.status_code == 503
            assert int(refused.headers["Retry-After"]) > 0
            rest = [line for line in lines if line]
        assert rest[-1] == "data: [DONE]"
        assert json.loads(rest[-2].removeprefix("data: "))["choices"][0]["finish_reason"] == "length"
