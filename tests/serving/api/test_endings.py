"""Every way in which a request ends before its time; nothing of it is left in the engine."""

import json
import threading
import time
from collections.abc import Iterator

import httpx
import openai
import pytest
from serving.api.running import Running, start_server

from cmx_jax.serving.scheduling.waiting import QueueLimits

LONG = {"model": "tiny", "prompt": "The", "max_tokens": 500, "temperature": 0, "ignore_eos": True}
SHORT = LONG | {"max_tokens": 4}


@pytest.fixture(scope="module")
def server(deployment) -> Iterator[Running]:
    with start_server(deployment, admin_keys=["root"]) as running:
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
def test_disconnect_during_stream(server, n) -> None:
    """The requests of a client that leaves a stream end."""
    before = ended(server, "abort")
    with server.http.stream("POST", "/v1/completions", json=LONG | {"stream": True, "n": n}) as answer:
        lines = answer.iter_lines()  # which leaves when it is forgotten
        assert next(lines).startswith("data: {")
        assert len(requests(server)) == n
    assert server.idle()
    assert ended(server, "abort") == before + n


def test_disconnect_before_answer(server) -> None:
    """A request ends when its client leaves before the answer."""
    before = ended(server, "abort")
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(f"{server.url}/v1/completions", json=LONG, timeout=0.3)
    assert server.idle()
    assert ended(server, "abort") == before + 1


def test_disconnect_while_queued(server) -> None:
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


def test_full_queue(server, monkeypatch) -> None:
    """A full queue answers 429 with a Retry-After header."""
    engine = server.context.deployment.engine
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


def test_full_queue_refuses_all_prompts(server, monkeypatch) -> None:
    """No prompt of a refused call is served."""
    engine = server.context.deployment.engine
    monkeypatch.setattr(engine, "limits", QueueLimits(max_num_queued_reqs=2))
    refused = server.http.post("/v1/completions", json=LONG | {"n": 5})
    assert refused.status_code == 429
    assert not engine.busy


def test_queue_timeout(server, monkeypatch) -> None:
    engine = server.context.deployment.engine
    with server.http.stream("POST", "/v1/completions", json=LONG | {"stream": True, "n": 32}) as answer:
        lines = answer.iter_lines()
        next(lines)
        monkeypatch.setattr(engine, "limits", QueueLimits(queue_ttl_s=0.05))
        late = server.http.post("/v1/completions", json=SHORT)
        assert late.status_code == 503
        assert "waited longer than 0.05 s" in late.json()["error"]["message"]
        next(line for line in lines if line)  # the stream goes on
    assert server.idle()


@pytest.mark.parametrize("stage", ["start_prefill", "start_decode"])
def test_failed_step(server, monkeypatch, stage) -> None:
    """A failed step ends the requests in it with an error, and no others."""
    instance = server.context.deployment.engine.decode
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


def test_failed_step_during_stream(server, monkeypatch) -> None:
    """A stream whose step fails ends with an error event."""
    instance = server.context.deployment.engine.decode
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


def test_internal_error(server, monkeypatch) -> None:
    """A failure of the server itself is reported as 500, in one line."""
    monkeypatch.setattr(type(server.context), "check", lambda *_: 1 / 0)
    answer = server.http.post("/v1/completions", json=SHORT)
    assert answer.status_code == 500
    assert answer.json()["error"]["message"] == "the server failed to answer: its log says why"


def test_failed_reset(deployment, monkeypatch) -> None:
    """A server whose engine cannot be reset is not healthy."""
    with start_server(deployment) as running:

        def fail(*_: object) -> None:
            raise RuntimeError("the device is gone")

        with monkeypatch.context() as patch:
            patch.setattr(deployment.engine, "reset", fail)
            patch.setattr(deployment.engine.decode, "start_prefill", fail)
            assert running.http.post("/v1/completions", json=SHORT).status_code == 500
            until(lambda: running.http.get("/health").status_code == 503)
        refused = running.http.post("/v1/completions", json=SHORT)
        assert refused.status_code == 503
        assert "restart the server" in refused.json()["error"]["message"]
    deployment.engine.reset()


def test_drain(deployment) -> None:
    """A draining server finishes running requests and refuses new ones."""
    with start_server(deployment, admin_keys=["root"]) as running:
        ask = LONG | {"stream": True, "max_tokens": 60}
        with running.http.stream("POST", "/v1/completions", json=ask) as answer:
            lines = answer.iter_lines()
            next(lines)
            received = running.http.post("/admin/drain", headers={"Authorization": "Bearer root"})
            assert received.json() == {"status": "draining", "running": 1}
            assert running.http.get("/health").status_code == 503
            refused = running.http.post("/v1/completions", json=SHORT)
            assert refused.status_code == 503
            assert int(refused.headers["Retry-After"]) > 0
            rest = [line for line in lines if line]
        assert rest[-1] == "data: [DONE]"
        assert json.loads(rest[-2].removeprefix("data: "))["choices"][0]["finish_reason"] == "length"
