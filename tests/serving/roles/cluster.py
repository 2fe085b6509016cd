"""Six processes that serve one model, as a user starts them: a cache server, two prefill workers, two decode
workers, and a router before them."""

import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
from serving.ems.stores import eventually, free_port

SECRET = "of the tests"
CONTEXT, BLOCK, CHUNK = 256, 32, 64
WORKER = ["--ranks", "2", "--max-model-len", str(CONTEXT), "--max-num-seqs", "8", "--cache-block", str(BLOCK)]
WORKER += ["--max-num-batched-tokens", str(CHUNK), "--shutdown-timeout-s", "30"]


@dataclass
class Process:
    """A process at a port of its own, which it keeps when it is started again."""

    folder: Path
    role: str
    arguments: Sequence[str]
    port: int = field(default_factory=free_port)
    popen: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def log(self) -> str:
        return (self.folder / f"{self.role}-{self.port}.log").read_text()

    @property
    def pid(self) -> int:
        assert self.popen is not None
        return self.popen.pid

    @property
    def alive(self) -> bool:
        return self.popen is not None and self.popen.poll() is None

    def start(self) -> None:
        command = [
            sys.executable,
            "-m",
            "cmx_jax.cli",
            "serve",
            "--role",
            self.role,
            "--port",
            str(self.port),
        ]
        with (self.folder / f"{self.role}-{self.port}.log").open("w") as log:
            environment = {**os.environ, "CMX_CLUSTER_SECRET": SECRET}
            command += self.arguments
            self.popen = subprocess.Popen(command, stdout=log, stderr=log, env=environment)

    def ready(self) -> bool:
        assert self.alive, self.log
        return "cmx: " in self.log

    def send(self, number: int) -> None:
        os.kill(self.pid, number)

    def kill(self) -> None:
        """Kills the process and waits until it is gone."""
        if self.popen is not None:
            self.popen.kill()
            self.popen.wait(10)

    def end(self) -> None:
        """Tells it to end; at once, if that takes too long."""
        if self.popen is not None:
            self.popen.terminate()
            try:
                self.popen.wait(20)
            except subprocess.TimeoutExpired:
                self.kill()

    def status(self) -> dict[str, Any]:
        headers = {"Authorization": f"Bearer {SECRET}"}
        return httpx.get(f"{self.url}/internal/status", headers=headers, timeout=10).raise_for_status().json()


class Cluster:
    """All of them. A test may do with any of them what it likes; `heal` makes the cluster whole again."""

    def __init__(self, folder: Path):
        self.disk = folder / "blocks"
        self.cache = Process(folder, "cache", ["--cache-dir", str(self.disk)])
        cache_address = ["--cache-server", f"127.0.0.1:{self.cache.port}"]
        self.prefill = [Process(folder, "prefill", ["tiny", *WORKER, *cache_address]) for _ in range(2)]
        self.decode = [Process(folder, "decode", ["tiny", *WORKER]) for _ in range(2)]
        workers = [f"--{p.role}={p.url}" for p in self.workers]
        self.router = Process(folder, "router", ["tiny", "--max-model-len", str(CONTEXT), *workers])
        self.http = httpx.Client(base_url=self.router.url, timeout=90)

    @property
    def workers(self) -> list[Process]:
        return [*self.prefill, *self.decode]

    @property
    def processes(self) -> list[Process]:
        return [self.cache, *self.workers, self.router]

    def heal(self) -> None:
        """Starts what does not run, and waits until all of it is used."""
        for process in self.processes:
            if not process.alive:
                process.start()
        eventually(lambda: all(process.ready() for process in self.processes), 90)
        eventually(lambda: not any(w["error"] for w in self.status()["workers"]), 30)

    def close(self) -> None:
        self.http.close()
        for process in reversed(self.processes):
            process.end()

    def status(self) -> dict[str, Any]:
        return self.http.get("/status").raise_for_status().json()

    def ask(self, prompt: list[int], **fields: Any) -> dict[str, Any]:
        """The answer's document, or the error's."""
        body = {"prompt": prompt, "temperature": 0, "ignore_eos": True, **fields}
        return self.http.post("/v1/completions", json=body).json()

    @contextmanager
    def asked(self, prompts: Sequence[list[int]], **fields: Any) -> Iterator[list["Future[dict[str, Any]]"]]:
        """Asks all at once; when the block begins, they decode."""
        with ThreadPoolExecutor(len(prompts)) as pool:
            answers = [pool.submit(self.ask, prompt, **fields) for prompt in prompts]
            eventually(lambda: sum(w["load"] > 0 for w in self.status()["workers"][2:]) == 2, 30)
            yield answers

    def left(self) -> dict[str, Any]:
        """Returns the work and pages that are left in any process; {} when all are idle."""
        counts = {w["url"]: w["load"] for w in self.status()["workers"]}
        for process in self.workers:
            status = process.status()
            names = ("waiting", "transfers", "running")
            counts |= {f"{process.url} {name}": status["counters"][name] for name in names}
            counts[f"{process.url} pages"] = sum(i["pages_used"] for i in status["instances"])
            counts[f"{process.url} kv"] = status["kv"]["waiting"]
        return {name: count for name, count in counts.items() if count}

    def idle(self) -> None:
        """Waits until nothing is left."""
        until = time.monotonic() + 45
        while left := self.left():
            assert time.monotonic() < until, left
            time.sleep(0.1)


def text(answer: "Future[dict[str, Any]]") -> tuple[str, int] | str:
    """A choice's text and the number of its tokens, or why there is none."""
    document = answer.result(90)
    if "error" in document:
        return document["error"]["message"]
    return document["choices"][0]["text"], document["usage"]["completion_tokens"]
