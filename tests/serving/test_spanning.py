"""One instance on two processes, each with half of its ranks: texts are those of one process, and the death
of a process is noticed."""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator

import httpx
import pytest

import cmx_jax
from cmx_jax.cli import main
from cmx_jax.errors import CmxError
from cmx_jax.serving.executor.spanning import Span

pytestmark = pytest.mark.slow

CMX = [sys.executable, "-m", "cmx_jax.cli", "serve", "tiny", "--port", "0"]
PROMPTS = ["The json module", "A class is", "x = [1, 2, 3]"]
FLAGS = ["--ranks", "4", "--max-num-seqs", "4", "--max-model-len", "128", "--cluster-secret", "s"]


def free_pair() -> int:
    """A port that is free, as is the next one."""
    while True:
        with socket.socket() as one, socket.socket() as two:
            one.bind(("127.0.0.1", 0))
            port = one.getsockname()[1]
            try:
                two.bind(("127.0.0.1", port + 1))
            except OSError:
                continue
            return port


@pytest.fixture(scope="module")
def processes() -> Iterator[tuple[list[subprocess.Popen], httpx.Client]]:
    at = f"127.0.0.1:{free_pair()}"
    environment = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
    started = [
        subprocess.Popen(
            [*CMX, *FLAGS, "--distributed", at, "--process-id", str(index)],
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env=environment,
        )
        for index in range(2)
    ]
    try:
        while not (line := started[0].stdout.readline()).startswith("cmx: tiny is served"):
            assert line, "the first process ended"
        with httpx.Client(base_url=line.split()[5].removesuffix("/v1,"), timeout=120) as http:
            yield started, http
    finally:
        for process in started:
            process.kill()
            process.communicate()


def complete(http: httpx.Client, **given: object) -> httpx.Response:
    body = {"prompt": PROMPTS, "max_tokens": 12, "temperature": 0, **given}
    return http.post("/v1/completions", json=body)


def test_spanning_text_equals_single_process(processes) -> None:
    _, http = processes
    llm = cmx_jax.from_pretrained("tiny", ranks=4)
    expected = [str(of) for of in llm.generate(PROMPTS, max_new_tokens=12)]
    answer = complete(http, logprobs=2).json()
    assert [choice["text"] for choice in answer["choices"]] == expected
    scored = complete(http, echo=True, logprobs=1, max_tokens=0).json()["choices"][0]["logprobs"]
    assert scored["token_logprobs"][0] is None
    assert all(p < 0 for p in scored["token_logprobs"][1:])
    # a prompt's blocks are taken off all ranks, and put back
    long = {"prompt": "The json module is a module. " * 12, "max_tokens": 4}
    first, second = complete(http, **long).json(), complete(http, **long).json()
    assert first["choices"][0]["text"] == second["choices"][0]["text"]


def test_dead_process_is_an_error_in_health(processes) -> None:
    (leader, follower), http = processes
    follower.send_signal(signal.SIGKILL)
    follower.wait()
    failed = complete(http)
    assert failed.status_code in (500, 503)
    assert "the request was not finished" in failed.json()["error"]["message"]
    until = time.monotonic() + 30
    while http.get("/health").status_code == 200 and time.monotonic() < until:
        complete(http)
    assert http.get("/health").status_code == 503
    leader.send_signal(signal.SIGTERM)
    assert leader.wait(60) == 0


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--distributed", "nowhere"], "expected HOST:PORT of process 0"),
        (["--distributed", "h:1", "--num-processes", "1"], "expected two or more"),
        (["--distributed", "h:1", "--process-id", "2"], "process 2 of 2"),
        (["--distributed", "h:1", "--num-processes", "3"], "4 ranks do not divide into 3 processes"),
        (["--distributed", "h:1", "--runner", "lanes"], "runner is 'lanes', expected devices"),
        (["--distributed", "h:1", "--deployment", "pools"], "--distributed is for one instance"),
    ],
)
def test_invalid_spans_are_refused(flags, message, capsys) -> None:
    assert main(["serve", "tiny", *FLAGS, *flags]) == 2
    assert message in capsys.readouterr().err


def test_span_without_secret_is_refused(capsys, monkeypatch) -> None:
    monkeypatch.delenv("CMX_CLUSTER_SECRET", raising=False)
    assert main(["serve", "tiny", "--distributed", "h:1"]) == 2
    assert "give --cluster-secret" in capsys.readouterr().err
    with pytest.raises(CmxError, match="expected HOST:PORT"):
        Span(coordinator="h:65535", processes=2, index=0)
