"""Choice of workers by a router: it uses those that answer, know the secret, and have the same pages."""

import asyncio
import contextlib
import json
import logging
import socket
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import httpx
import pytest
from reference.dense import greedy
from serving.ems.stores import free_port
from serving.roles.workers import CONTEXT, SECRET, Running, routed, running, tokens
from support import BASE, instance

from cmx_jax.cli import main
from cmx_jax.errors import CmxError
from cmx_jax.serving.api.app import make_app
from cmx_jax.serving.api.context import ApiContext, Limits
from cmx_jax.serving.deploy.deployment import ModelInfo
from cmx_jax.serving.deploy.model import Model
from cmx_jax.serving.http.server import Server, bind, url
from cmx_jax.serving.roles import members as module
from cmx_jax.serving.roles.members import Members
from cmx_jax.serving.roles.router import Router
from cmx_jax.serving.scheduling.allocator import Capacity
from cmx_jax.serving.service.counters import WorkerLoad
from cmx_jax.serving.service.frontend import Unavailable


@pytest.fixture(scope="module")
def workers(base: Model) -> Iterator[dict[str, Running]]:
    """One that prefills, one that decodes, one whose pages are INT8, and one with another secret."""
    plain = [instance(base, name, 1, sequences=2, pages=32) for name in ("prefill", "decode", "stranger")]
    layout, runner = plain[1].layout, plain[1].programs.runner
    capacity = Capacity(page_width=8, sequences=2, pages=32)
    int8 = base.instance("int8", layout, runner, capacity, kv_cache_dtype="int8")
    with contextlib.ExitStack() as stack:
        yield {
            "prefill": stack.enter_context(running("prefill", plain[0], base)),
            "decode": stack.enter_context(running("decode", plain[1], base)),
            "int8": stack.enter_context(running("decode", int8, base)),
            "stranger": stack.enter_context(running("decode", plain[2], base, secret="another")),
        }


def test_worker_with_other_pages(workers, prompts, caplog) -> None:
    """A worker with other pages is not used, and both values are shown."""
    prefill, decode, int8 = (workers[name].url for name in ("prefill", "decode", "int8"))
    reason = f"has kv_cache_dtype 'int8', {prefill} 'float32'"

    async def act(router: Router) -> list[WorkerLoad]:
        for prompt in prompts[:4]:
            assert await tokens(router, prompt, max_tokens=5) == list(greedy(BASE, prompt, 5))
        return router.workers()

    with caplog.at_level(logging.WARNING):
        result = routed(Members([prefill], [int8, decode], SECRET), act)
    assert [w.error for w in result] == [None, reason, None]
    assert workers["int8"].engine.steps == 0
    assert f"decode worker {int8} {reason}" in caplog.messages

    async def alone(router: Router) -> None:
        with pytest.raises(Unavailable) as error:
            await tokens(router, prompts[0])
        assert str(error.value) == router.broken == f"no worker can decode now ({int8} {reason})"

    routed(Members([prefill], [int8], SECRET, patience_s=0.1), alone)


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("stranger", "the key is missing or wrong, expected the header 'Authorization: Bearer KEY'"),
        ("prefill", "is a prefill worker, expected one that can decode"),
    ],
)
def test_worker_with_another_secret_or_role(name, reason, workers, prompts) -> None:
    """A worker with another secret or role is reported in one line."""

    async def act(router: Router) -> str:
        with pytest.raises(Unavailable) as error:
            await tokens(router, prompts[0])
        return str(error.value)

    members = Members([workers["prefill"].url], [workers[name].url], SECRET, patience_s=0.1)
    result = routed(members, act)
    assert result.startswith(f"no worker can decode now ({workers[name].url} {reason}")
    assert "\n" not in result


class NoWorker(BaseHTTPRequestHandler):
    """Answers everything with 200 and something else."""

    def do_GET(self) -> None:
        body = json.dumps({"hello": "world"}).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


def test_worker_is_another_server(workers) -> None:
    """Another HTTP server is not used as a worker."""
    with ThreadingHTTPServer(("127.0.0.1", 0), NoWorker) as other:
        thread = threading.Thread(target=other.serve_forever, args=(0.02,))
        thread.start()

        async def act(router: Router) -> str | None:
            return router.broken

        members = Members([workers["prefill"].url], [f"http://127.0.0.1:{other.server_address[1]}"], SECRET)
        assert "does not answer as a worker does" in (routed(members, act) or "")
        other.shutdown()
        thread.join()


def test_worker_hangs(workers, prompts, monkeypatch) -> None:
    """A listener that accepts and never says a word is what a stopped process looks like."""
    monkeypatch.setattr(module, "SILENCE_S", 1.0)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        hanging = f"http://127.0.0.1:{silent.getsockname()[1]}"
        members = Members([workers["prefill"].url], [hanging, workers["decode"].url], SECRET)

        async def act(router: Router) -> tuple[list[int], float]:
            first = members.all[1]
            first.status = members.all[2].status  # it was well a moment ago, and has less to do
            first.error, first.load = "", -1000
            began = time.monotonic()
            result = await tokens(router, prompts[4], max_tokens=5)
            first.load += 1000
            return result, time.monotonic() - began

        result, took = routed(members, act)
    assert result == list(greedy(BASE, prompts[4], 5))
    assert 0.5 < took < 20


def test_router_without_workers(base: Model) -> None:
    """A router without workers answers 503 with the reason."""
    urls = [f"http://127.0.0.1:{free_port()}" for _ in range(2)]
    router = Router(Members(urls[:1], urls[1:], SECRET, patience_s=0.2))
    hosted = ModelInfo(name="router", model=base, max_model_len=CONTEXT)
    context = ApiContext(name="base", deployment=hosted, service=router, template=None, limits=Limits())
    server, ready = Server(make_app(context), router, shutdown_timeout_s=1), threading.Event()
    with bind("127.0.0.1", 0) as sock:
        thread = threading.Thread(target=server.run_on, args=(sock, ready.set), daemon=True)
        thread.start()
        assert ready.wait(30)
        with httpx.Client(base_url=url(sock), timeout=10) as http:
            answer = http.post("/v1/completions", json={"prompt": [1, 2], "max_tokens": 2})
            health = http.get("/health")
        server._loop.call_soon_threadsafe(server.stop)
        thread.join(10)
    reason = f"no worker can prefill now ({urls[0]} cannot be reached (All connection attempts failed))"
    assert (answer.status_code, answer.json()["error"]["message"]) == (503, reason)
    assert int(answer.headers["Retry-After"]) > 0
    assert (health.status_code, health.json()["status"]) == (503, reason)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--role", "router"], "--role router needs the secret that all roles share: give --cluster-secret"),
        (
            ["--role", "router", "--cluster-secret", "x"],
            "expected at least one --prefill URL and one --decode",
        ),
        (["--role", "prefill", "--cluster-secret", ""], "--role prefill needs the secret"),
    ],
)
def test_mistake_is_one_line(arguments, message, capsys, monkeypatch) -> None:
    monkeypatch.delenv("CMX_CLUSTER_SECRET", raising=False)
    assert main(["serve", "tiny", "--port", "0", *arguments]) == 2
    output = capsys.readouterr()
    [line] = output.err.splitlines()
    assert message in line


def test_members_invalid_address() -> None:
    """Invalid addresses are refused."""
    with pytest.raises(CmxError, match="is not the address of a worker"):
        asyncio.run(_made("http://[::"))


async def _made(address: str) -> Members:
    return Members([address], ["http://127.0.0.1:1"], SECRET)
