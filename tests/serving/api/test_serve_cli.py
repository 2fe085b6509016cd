"""`cmx serve` as a process: it says where it is, ends as it should, and refuses what cannot work."""

import json
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import httpx
import pytest

from cmx_jax.cli import main

pytestmark = pytest.mark.slow

CMX = [sys.executable, "-m", "cmx_jax.cli", "serve", "tiny"]
LONG = {"prompt": "The", "max_tokens": 400, "temperature": 0, "ignore_eos": True, "stream": True}


@contextmanager
def process(*arguments: str) -> Iterator[tuple[subprocess.Popen, httpx.Client]]:
    command = [*CMX, "--port", "0", *arguments]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as done:
        try:
            line = done.stdout.readline()
            assert line.startswith("cmx: tiny is served at http://127.0.0.1:"), done.stderr.read()
            with httpx.Client(base_url=line.split()[5].removesuffix("/v1,"), timeout=60) as http:
                yield done, http
        finally:
            done.kill()


def events(lines: Iterator[str]) -> list[dict]:
    events = [line.removeprefix("data: ") for line in lines if line]
    assert events[-1] == "[DONE]"
    return [json.loads(document) for document in events[:-1]]


def test_sigterm_finishes_requests(monkeypatch) -> None:
    """SIGTERM lets running requests finish."""
    monkeypatch.setenv("CMX_API_KEY", "secret")
    with process("--api-key", "other", "--shutdown-timeout-s", "120") as (done, http):
        assert http.get("/v1/models").status_code == 401
        for key in ("other", "secret"):
            http.headers["Authorization"] = f"Bearer {key}"
            assert http.get("/v1/models").status_code == 200
        with http.stream("POST", "/v1/completions", json=LONG) as answer:
            lines = answer.iter_lines()
            next(lines)
            done.send_signal(signal.SIGTERM)
            while (health := http.get("/health")).status_code == 200:
                pass
            assert (health.status_code, health.json()) == (503, {"status": "draining"})
            refused = http.post("/v1/completions", json=LONG)
            assert refused.status_code == 503
            assert int(refused.headers["Retry-After"]) > 0
            assert events(lines)[-1]["choices"][0]["finish_reason"] == "length"
        assert done.wait(30) == 0
        assert done.stderr.read() == ""


def test_interrupt_timeout() -> None:
    with process("--shutdown-timeout-s", "0.2", "--served-model-name", "tiny") as (done, http):
        with http.stream("POST", "/v1/completions", json=LONG | {"n": 32}) as answer:
            lines = answer.iter_lines()
            next(lines)
            done.send_signal(signal.SIGINT)
            last = events(lines)[-1]
        assert last["error"]["type"] == "service_unavailable_error"
        assert "the server is shutting down: the request was not finished" in last["error"]["message"]
        assert done.wait(30) == 0
        assert done.stderr.read() == ""


def test_serve_pools(llm) -> None:
    """The supernode's pools serve the same text."""
    with process("--deployment", "pools", "--prefill-instances", "1", "--max-model-len", "64") as (_, http):
        ask = {"prompt": "The json module", "max_tokens": 6, "temperature": 0}
        answer = http.post("/v1/completions", json=ask).raise_for_status()
        assert (
            answer.json()["choices"][0]["text"] == llm.generate("The json module", max_new_tokens=6)[0].text
        )
        instances = http.get("/status").json()["instances"]
    assert [(i["name"], i["roles"], i["first_npu"], i["npus"]) for i in instances] == [
        ("prefill-0", ["prefill"], 160, 16),
        ("decode-0", ["decode"], 0, 160),
    ]


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The one line that the command says when it exits with 2."""
    try:
        code = main(["serve", "tiny", *arguments])
    except SystemExit as ended:  # argparse
        code = ended.code
    output = capsys.readouterr()
    assert (code, output.out) == (2, "")
    [line] = output.err.splitlines()
    return line


def test_serve_port_in_use(capsys) -> None:
    """A port in use is reported in one line."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        line = refused(capsys, "--port", str(port))
    assert f"127.0.0.1:{port} cannot be bound (Address already in use): choose another --port" in line


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--port", "70000"), "port is 70000, expected 0"),
        (("--host", "host.invalid"), "host 'host.invalid' is not an address of this machine"),
        (("--host", "a..b"), "host 'a..b' is not an address of this machine"),
        (("--api-key", ""), "a key is empty"),
        (("--shutdown-timeout-s", "-1"), "shutdown_timeout_s is -1.0, expected zero or more"),
        (("--max-body-bytes", "0"), "max_body_bytes is 0, expected at least 1"),
        (("--max-num-queued-reqs", "0"), "max_num_queued_reqs is 0, expected more than zero"),
        (("--queue-ttl-s", "nan"), "queue_ttl_s is nan, expected more than zero"),
        (("--max-model-len", "513"), "max_model_len is 513, expected 1 to the model's context of 512"),
        (("--max-num-seqs", "0"), "max_num_seqs is 0"),
        (("--prefill-instances", "2"), "--prefill-instances is for --deployment pools: leave it out"),
        (("--deployment", "pools", "--ranks", "8"), "--ranks is for one instance: leave it out"),
        (("--deployment", "pools", "--max-model-len", "0"), "max_model_len is 0, expected 1 to"),
        (("--deployment", "cloud"), "invalid choice: 'cloud'"),
        (("--num-speculative-tokens", "99"), "num_speculative_tokens is 99, expected zero or more, at most"),
    ],
)
def test_mistake_is_one_line(capsys, arguments: tuple[str, ...], message: str) -> None:
    assert message in refused(capsys, "--port", "0", *arguments)
