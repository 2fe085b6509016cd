"""The contract of every store, keys and payloads for tests, and free ports."""

import hashlib
import socket
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from cmx_jax.errors import CmxError
from cmx_jax.serving.ems import MPServer, Store

SECRET = "a secret of these tests"


def key(n: int) -> bytes:
    return hashlib.sha256(f"key {n}".encode()).digest()


def payload(n: int, size: int = 1000) -> bytes:
    return bytes((n * 31 + i * i) % 251 for i in range(size))


def server(folder: Path, **options: object) -> MPServer:
    return MPServer(folder, **{"dram": 1 << 20, "disk": 4 << 20, **options})


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return listener.getsockname()[1]


def eventually(condition: Callable[[], bool], seconds: float = 10.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "did not happen in time"
        time.sleep(0.02)


def listening(port: int) -> bool:
    try:
        socket.create_connection(("127.0.0.1", port), 1).close()
    except OSError:
        return False
    return True


def keeps_the_contract(store: Store, tier: str) -> None:
    """Held against what was put: values of many sizes, namespaces, repeated puts, deletes, refusals."""
    assert store.get("one", key(0)) is None
    assert not store.exists("one", key(0))
    assert not store.delete("one", key(0))
    sizes = (0, 1, 63, 4096, 100_000)
    for n, size in enumerate(sizes):
        assert store.put("one", key(n), payload(n, size))
    for n, size in enumerate(sizes):
        assert store.exists("one", key(n))
        assert store.get("one", key(n)) == (payload(n, size), tier)
        assert store.get("two", key(n)) is None
        assert not store.exists("two", key(n))
    assert store.put("one", key(3), b"another value of the key")
    assert store.get("one", key(3)).payload == payload(3, 4096)
    assert store.put("two", key(3), b"of another tenant")
    assert store.get("two", key(3)).payload == b"of another tenant"
    assert store.delete("one", key(3))
    assert store.get("one", key(3)) is None
    assert store.get("two", key(3)).payload == b"of another tenant"
    with pytest.raises(CmxError, match=r"namespace '\.\./one', expected"):
        store.put("../one", key(0), b"")
    with pytest.raises(CmxError, match="key of 3 bytes, expected 32"):
        store.get("one", b"key")
    stats = store.stats()
    assert stats["hits"][tier] == 8
    assert stats["misses"] == 7
