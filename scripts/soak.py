"""A server under hundreds of requests that come, leave and overload it: what was wrong, and what is left.

    python scripts/soak.py [--requests 500] [--roles] [--overload] [--seconds 10] [--queue 64] [--json]

Starts `cmx serve tiny` (`--roles`: two prefill workers, two decode workers, a cache server and a router). A
fifth of the requests leave at some moment; all others must end with the text that the model says offline.
Then nothing may be left; memory is shown before, and behind each fifth. Another round finds all programs
compiled: its rate is what can be served. `--overload` sends ten times as many requests a second: what is
admitted must be right, what is not must be told when to come again, and the server must stay reachable.
"""

import argparse
import asyncio
import json
import random
import subprocess
import sys
import tempfile
import time
from collections import Counter
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx
import numpy as np

import cmx_jax

SECRET, CONTEXT, LONGEST = "of the soak", 256, 48
CONCURRENT, LEAVE = 32, 0.2
AUTH = {"Authorization": f"Bearer {SECRET}"}
Ask = tuple[list[int], int, str]  # a prompt, how many tokens, and the text of these


class Servers:
    """Processes that this script started.

    Attributes:
      queue: requests that may wait; what is admitted under overload waits for these at most.
      url: where requests go.
      workers: URLs that have an `/internal/status`.
    """

    def __init__(self, folder: Path, queue: int):
        self.folder, self.queue, self.url = folder, queue, ""
        self.processes: list[subprocess.Popen[bytes]] = []
        self.workers: list[str] = []

    def start(self, roles: bool) -> None:
        """One server, or all roles one behind the other, as each must know where the others are."""
        room, api = ["--max-model-len", str(CONTEXT)], ["--max-num-queued-reqs", str(self.queue)]
        if not roles:
            self.url = self._start("tiny", *room, *api, "--cache-block", "32")
            return
        cache = self._start("--role", "cache").removeprefix("http://")
        small = ["tiny", "--ranks", "4", "--max-num-seqs", "16", "--cache-block", "32", *room]
        prefill = [self._start(*small, "--role", "prefill", "--cache-server", cache) for _ in range(2)]
        decode = [self._start(*small, "--role", "decode") for _ in range(2)]
        self.workers = [*prefill, *decode]
        given = [f"--prefill={url}" for url in prefill] + [f"--decode={url}" for url in decode]
        self.url = self._start("tiny", "--role", "router", *room, *api, *given)

    def _start(self, *arguments: str) -> str:
        command = [sys.executable, "-m", "cmx_jax.cli", "serve", *arguments]
        command += ["--port", "0", "--cluster-secret", SECRET]
        log = (self.folder / f"{len(self.processes)}.log").open("w")
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log)
        self.processes.append(process)
        assert process.stdout is not None
        line = process.stdout.readline().decode()
        if not line.startswith("cmx: "):
            raise SystemExit(f"{' '.join(arguments)} did not start: {Path(log.name).read_text()}")
        found = next(word for word in line.split() if "127.0.0.1:" in word)
        return f"http://{found.rstrip(',').removesuffix('/v1').removeprefix('http://')}"

    def memory(self) -> int:
        """Resident memory of all of them, MiB, without the caching pool's segment, which fills up."""
        texts = (Path(f"/proc/{p.pid}/status").read_text() for p in self.processes)
        return sum(int(text.partition("RssAnon:")[2].split()[0]) for text in texts) >> 10

    async def left(self, http: httpx.AsyncClient) -> dict[str, int]:
        """Requests and pages that are still held anywhere."""
        found: Counter[str] = Counter()
        status = (await http.get("/status")).json()
        found.update({name: status[name] for name in ("waiting", "running", "transfers")})
        found["pages"] = sum(i["pages_used"] for i in status["instances"])
        for url in self.workers:
            said = (await http.get(f"{url}/internal/status", headers=AUTH)).json()
            found["unfetched"] += said["kv"]["waiting"]
            found["pages"] += sum(i["pages_used"] for i in said["instances"])
        return dict(found)

    def stop(self) -> None:
        for process in reversed(self.processes):
            process.terminate()
        for process in self.processes:
            with suppress(subprocess.TimeoutExpired):
                process.wait(40)
            process.kill()


def asks(count: int) -> list[Ask]:
    """Prompts of many lengths, each several times, and what the model says behind them offline."""
    rng, llm = np.random.default_rng(0), cmx_jax.from_pretrained("tiny", max_model_len=CONTEXT)
    lengths = rng.integers(1, CONTEXT - LONGEST, max(count // 5, 1))
    some = [rng.integers(0, 1024, length).tolist() for length in lengths]
    whole = llm.generate(some, max_new_tokens=LONGEST, ignore_eos=True)
    found = []
    for i in range(count):
        of, tokens = whole[i % len(some)], int(rng.integers(1, LONGEST + 1))
        found.append((of.prompt_tokens, tokens, llm.model.decode(of.tokens[:tokens])))
    return found


async def stream(url: str, ask: Ask, leave: int | None) -> dict[str, Any]:
    """How a request ended, and when: `right`, `wrong`, `left` (behind `leave` events), or the status or error
    that it got. Over a socket: an HTTP library's client would be busier than the server."""
    prompt, tokens, expected = ask
    body = {"prompt": prompt, "max_tokens": tokens, "temperature": 0, "ignore_eos": True, "stream": True}
    began, found, first, events, error = time.perf_counter(), "", None, 0, ""
    reader, writer = await asyncio.open_connection("127.0.0.1", int(url.rpartition(":")[2]))
    try:
        content = json.dumps(body).encode()
        head = "POST /v1/completions HTTP/1.1\r\nHost: soak\r\nConnection: close\r\n"
        head += f"Content-Type: application/json\r\nContent-Length: {len(content)}\r\n\r\n"
        writer.write(head.encode() + content)
        status, *headers = (await reader.readuntil(b"\r\n\r\n")).decode().lower().splitlines()
        if status.split()[1] != "200":
            return {"end": status.split()[1], "told": any(h.startswith("retry-after: ") for h in headers)}
        async for line in reader:
            if leave is not None and events >= leave:
                return {"end": "left"}
            if line.startswith(b"data: {"):
                document = json.loads(line.removeprefix(b"data: "))
                error = document.get("error", {}).get("message", "")
                found += "".join(choice["text"] for choice in document.get("choices", ()))
                first, events = first or time.perf_counter() - began, events + 1
    finally:
        writer.close()
    end = error or ("right" if found == expected else "wrong")
    return {"end": end, "ttft_s": first, "e2e_s": time.perf_counter() - began, "tokens": tokens}


async def soak(servers: Servers, http: httpx.AsyncClient, all_asks: list[Ask]) -> dict[str, Any]:
    """All requests, so many at a time; a fifth of them leave."""
    random.seed(1)
    places, memory = asyncio.Semaphore(CONCURRENT), [servers.memory()]
    done: list[dict[str, Any]] = []

    async def one(ask: Ask) -> None:
        leave = random.randrange(ask[1] // 2 + 1) if random.random() < LEAVE else None
        async with places:
            done.append(await stream(servers.url, ask, leave))
        if len(done) % max(len(all_asks) // 5, 1) == 0:
            memory.append(servers.memory())

    began = time.perf_counter()
    await asyncio.gather(*map(one, all_asks))
    took = time.perf_counter() - began
    return {
        "ends": dict(Counter(of["end"] for of in done)),
        "seconds": took,
        "requests_per_s": len(done) / took,
        "tokens_per_s": sum(of.get("tokens", 0) for of in done) / took,
        "memory_mib": memory,
        "left": await idle(servers, http),
    }


async def idle(servers: Servers, http: httpx.AsyncClient) -> dict[str, int]:
    """What is left behind some seconds."""
    until = time.monotonic() + 40
    while any((left := await servers.left(http)).values()) and time.monotonic() < until:
        await asyncio.sleep(0.2)
    return left


async def overload(
    servers: Servers, http: httpx.AsyncClient, all_asks: list[Ask], rate: float, seconds: float
) -> dict[str, Any]:
    """Ten times what can be served, for some seconds."""
    calm = [await stream(servers.url, ask, None) for ask in all_asks[:10]]
    health: list[float] = []

    async def healthy() -> None:
        while True:
            began = time.perf_counter()
            (await http.get("/health")).raise_for_status()
            health.append(time.perf_counter() - began)
            await asyncio.sleep(0.1)

    watch, sent, began = asyncio.create_task(healthy()), [], time.perf_counter()
    while (now := time.perf_counter() - began) < seconds:
        while len(sent) < 10 * rate * now:
            ask = all_asks[len(sent) % len(all_asks)]
            sent.append(asyncio.create_task(stream(servers.url, ask, None)))
        await asyncio.sleep(0.005)
    done = await asyncio.gather(*sent)
    watch.cancel()
    refused = [of for of in done if of["end"] == "429"]
    return {
        "sent": len(sent),
        "sent_per_s": len(sent) / seconds,
        "ends": dict(Counter(of["end"] for of in done)),
        "without_retry_after": sum(not of["told"] for of in refused),
        "calm": latencies(calm),
        "admitted": latencies(done),
        "health_s": {"median": float(np.median(health)), "most": max(health), "asked": len(health)},
        "left": await idle(servers, http),
    }


def latencies(done: list[dict[str, Any]]) -> dict[str, float]:
    """Of those that were right."""
    right = [of for of in done if of["end"] == "right"]
    names = ("ttft_s", "e2e_s")
    return {
        f"{name} p{q}": float(np.percentile([of[name] for of in right], q))
        for name in names
        for q in (50, 95)
    }


def show(result: dict[str, Any], before: str = "") -> None:
    for name, value in result.items():
        if isinstance(value, dict):
            show(value, f"{before}{name} ")
        else:
            print(f"{before + name:32} {f'{value:.3g}' if isinstance(value, float) else value}")


async def run(servers: Servers, args: argparse.Namespace) -> dict[str, Any]:
    async with httpx.AsyncClient(base_url=servers.url, timeout=60) as http:
        everything = asks(args.requests)
        result = {name: await soak(servers, http, everything) for name in ("soak", "again")}
        if args.overload:
            rate = result["again"]["requests_per_s"]
            result["overload"] = await overload(servers, http, everything, rate, args.seconds)
        return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--requests", type=int, default=500, help="of the soak (default 500)")
    parser.add_argument("--roles", action="store_true", help="six processes instead of one")
    parser.add_argument("--overload", action="store_true", help="ten times as many as can be served, too")
    parser.add_argument("--seconds", type=float, default=10.0, help="of the overload (default 10)")
    parser.add_argument("--queue", type=int, default=64, help="requests that may wait (default 64)")
    parser.add_argument("--json", action="store_true", help="one JSON document")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="cmx-soak-") as folder:
        servers = Servers(Path(folder), args.queue)
        try:
            servers.start(args.roles)
            result = asyncio.run(run(servers, args))
        finally:
            servers.stop()
    print(json.dumps(result, indent=2)) if args.json else show(result)
    wrong = {end for part in result.values() for end in part["ends"]} - {"right", "left", "429"}
    if wrong or any(sum(part["left"].values()) for part in result.values()):
        sys.exit(f"soak: {', '.join(wrong) or 'something is left'}")


if __name__ == "__main__":
    main()
