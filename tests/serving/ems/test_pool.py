"""A pool of servers, of which some fail: what they held is missed, and everything goes on."""

import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from serving.ems.stores import SECRET, eventually, free_port, key, listening, payload, server

from cmx_jax.errors import CmxError
from cmx_jax.serving.ems import Hit, MPServer, Pool, RemoteStore, Ring

KEYS = [key(n) for n in range(40)]


@pytest.fixture
def pool(tmp_path: Path) -> Iterator[Pool]:
    pool = Pool({name: server(tmp_path / name) for name in ("a", "b", "c")})
    yield pool
    pool.close()


class Gate:
    """A store whose puts wait until they are let through."""

    def __init__(self, store: MPServer) -> None:
        self.store, self.open = store, threading.Event()

    def put(self, namespace: str, key: bytes, payload: bytes) -> bool:
        assert self.open.wait(20)
        return self.store.put(namespace, key, payload)

    def get(self, namespace: str, key: bytes) -> Hit | None:
        return self.store.get(namespace, key)

    def exists(self, namespace: str, key: bytes) -> bool:
        return self.store.exists(namespace, key)

    def delete(self, namespace: str, key: bytes) -> bool:
        return self.store.delete(namespace, key)

    def stats(self) -> dict[str, Any]:
        return self.store.stats()

    def close(self) -> None:
        self.open.set()
        self.store.close()


def test_pool_placement(pool: Pool) -> None:
    """Blocks are stored on the server that the ring selects."""
    for n, k in enumerate(KEYS):
        assert pool.put("one", k, payload(n))
    assert [pool.get("one", k) for k in KEYS] == [payload(n) for n in range(40)]
    stats, ring = pool.stats(), Ring(["a", "b", "c"])
    for name in ("a", "b", "c"):
        mine = sum(ring.server(k) == name for k in KEYS)
        assert stats["servers"][name]["disk"]["blocks"] == mine > 0
    assert (stats["stored"], stats["hits"], stats["misses"]) == (40, {"dram": 40}, 0)
    assert pool.delete("one", KEYS[0])
    assert pool.get("one", KEYS[0]) is None


@pytest.mark.parametrize("missing", [0, 1, 7, 39, 40])
def test_pool_match_and_get_many(pool: Pool, missing: int) -> None:
    """The longest run of leading keys is matched and fetched."""
    for n, k in enumerate(KEYS):
        if n != missing:
            pool.put("one", k, payload(n))
    assert pool.match("one", KEYS) == missing
    assert pool.get_many("one", KEYS) == [payload(n) for n in range(missing)]
    assert pool.match("two", KEYS) == 0
    assert pool.get_many("two", KEYS) == []


def test_pool_without_stores() -> None:
    """A pool without stores is refused."""
    with pytest.raises(CmxError, match="servers none"):
        Pool({})


def test_pool_put_async_and_flush(pool: Pool) -> None:
    """Asynchronous puts are stored after a flush."""
    for n, k in enumerate(KEYS):
        assert pool.put_async("one", k, payload(n))
    assert pool.flush(20)
    assert pool.get_many("one", KEYS) == [payload(n) for n in range(40)]
    with pytest.raises(CmxError, match="namespace 'One'"):
        pool.put_async("One", KEYS[0], b"")


def test_pool_full_queue(tmp_path: Path) -> None:
    """A full queue drops puts and counts them."""
    gate = Gate(server(tmp_path))
    pool = Pool({"a": gate}, queue=3)
    assert pool.put_async("one", KEYS[0], payload(0))
    eventually(lambda: pool.stats()["waiting"] == 1 and not pool._background._jobs)  # the worker has it
    assert [pool.put_async("one", k, b"") for k in KEYS[1:6]] == [True, True, True, False, False]
    start = time.monotonic()
    assert not pool.flush(0.2)
    assert 0.15 < time.monotonic() - start < 5
    assert (pool.stats()["dropped"], pool.stats()["waiting"]) == (2, 4)
    gate.open.set()
    assert pool.flush(20)
    assert [pool.get("one", k) is not None for k in KEYS[:6]] == [True] * 4 + [False] * 2
    pool.close()


def test_pool_close_timeout(tmp_path: Path) -> None:
    """Closing takes no longer than its timeout."""
    gate = Gate(server(tmp_path))
    pool = Pool({"a": gate})
    for k in KEYS[:5]:
        pool.put_async("one", k, b"")
    eventually(lambda: len(pool._background._jobs) == 4)
    start = time.monotonic()
    pool.close(0.3)
    assert time.monotonic() - start < 5
    assert not pool.put_async("one", KEYS[6], b"")
    assert pool._counts["dropped"] == 5
    pool.close()


def test_pool_failing_put(tmp_path: Path) -> None:
    """A put that raises does not prevent the others."""
    pool = Pool({"a": server(tmp_path)})
    pool._background.submit(lambda: 1 // 0)
    pool.put_async("one", KEYS[0], b"after it")
    assert pool.flush(20)
    assert pool.get("one", KEYS[0]) == b"after it"
    assert "ZeroDivisionError" in pool.stats()["error"]
    pool.close()


SERVER = """
import sys, time; from pathlib import Path; sys.path.insert(0, sys.argv[4])
from cmx_jax.serving.ems import serve
from serving.ems.stores import server
serve(server(Path(sys.argv[1])), secret=sys.argv[3], port=int(sys.argv[2]))
time.sleep(60)
"""


class Node:
    """A cache server that is a process of its own."""

    def __init__(self, folder: Path, port: int) -> None:
        tests = str(Path(__file__).parents[2])
        command = [sys.executable, "-c", SERVER, str(folder), str(port), SECRET, tests]
        self.process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
        eventually(lambda: listening(port), 30)

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()


def test_pool_dead_server(tmp_path: Path) -> None:
    """A dead server causes misses, is skipped, and is used again when it is back."""
    ports = {"a": free_port(), "b": free_port()}
    nodes = {name: Node(tmp_path / name, port) for name, port in ports.items()}
    stores = {
        name: RemoteStore(f"127.0.0.1:{port}", secret=SECRET, timeout=3) for name, port in ports.items()
    }
    pool, ring = Pool(stores, backoff=1.5), Ring(ports)
    try:
        assert all(pool.put("one", k, payload(n)) for n, k in enumerate(KEYS))
        assert pool.get_many("one", KEYS) == [payload(n) for n in range(40)]
        nodes["b"].kill()
        available = [pool.get("one", k) is not None for k in KEYS]
        assert available == [ring.server(k) == "a" for k in KEYS]
        stats = pool.stats()
        assert stats["failures"] == 1
        assert stats["skipped"] >= available.count(False) - 1
        assert stats["servers"]["a"]["disk"]["blocks"] == available.count(True)
        assert f"127.0.0.1:{ports['b']}" in stats["servers"]["b"]["error"]
        assert not pool.put("one", next(k for k in KEYS if ring.server(k) == "b"), b"lost")
        assert pool.stats()["lost"] == 1
        nodes["b"] = Node(tmp_path / "b", ports["b"])
        eventually(lambda: pool.get_many("one", KEYS) == [payload(n) for n in range(40)])
        assert pool.stats()["hits"]["disk"] >= available.count(False)  # its DRAM was lost with it
    finally:
        pool.close()
        for node in nodes.values():
            node.kill()
