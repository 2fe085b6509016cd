"""The same store on a real Redis or Valkey server."""

import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from serving.ems.stores import eventually, free_port, keeps_the_contract, key, listening, payload

from cmx_jax.errors import CmxError
from cmx_jax.serving.ems import Pool
from cmx_jax.serving.ems.valkey import ValkeyStore

BINARY = shutil.which("valkey-server") or shutil.which("redis-server")
needs_server = pytest.mark.skipif(
    BINARY is None, reason="neither valkey-server nor redis-server is installed"
)


@pytest.fixture
def process(tmp_path: Path) -> Iterator[tuple[subprocess.Popen, int]]:
    port = free_port()
    options = ["--port", str(port), "--bind", "127.0.0.1", "--save", "", "--maxmemory", "8mb"]
    with subprocess.Popen([BINARY, *options, "--dir", str(tmp_path)], stdout=subprocess.DEVNULL) as process:
        try:
            eventually(lambda: listening(port))
            yield process, port
        finally:
            process.kill()


@needs_server
def test_store_contract(process: tuple[subprocess.Popen, int]) -> None:
    store = ValkeyStore(f"valkey://127.0.0.1:{process[1]}/0")
    keeps_the_contract(store, "valkey")
    assert store.stats()["valkey"]["blocks"] == 5
    store.close()


@needs_server
def test_valkey_damaged_value(process: tuple[subprocess.Popen, int]) -> None:
    """A damaged value is a miss and is removed."""
    import valkey

    store = ValkeyStore(f"redis://127.0.0.1:{process[1]}")
    store.put("one", key(1), b"payload")
    other = valkey.Valkey(port=process[1])
    assert other.setrange(f"cmx:one:{key(1).hex()}", 80, b"?") == 85
    assert store.get("one", key(1)) is None
    assert other.dbsize() == 0
    assert store.stats()["bad"] == 1
    other.close()
    store.close()


@needs_server
def test_valkey_full_and_dead_server(process: tuple[subprocess.Popen, int]) -> None:
    """A full server refuses puts, and a dead one raises an error."""
    store = ValkeyStore(f"valkey://127.0.0.1:{process[1]}", timeout=2)
    stored = [n for n in range(12) if store.put("one", key(n), payload(n, 1 << 20))]
    assert 2 < len(stored) < 9
    assert store.stats()["refused"] == 12 - len(stored)
    assert all(store.get("one", key(n)) == (payload(n, 1 << 20), "valkey") for n in stored)
    process[0].kill()
    process[0].wait()
    with pytest.raises(ConnectionError, match="Valkey: "):
        store.get("one", key(0))
    pool = Pool({"a": store})
    assert pool.get("one", key(0)) is None
    assert not pool.put("one", key(0), b"")
    assert (pool.stats()["failures"], pool.stats()["misses"]) == (1, 1)
    pool.close()


def test_valkey_invalid_url() -> None:
    """Invalid URLs are refused."""
    with pytest.raises(CmxError, match="http://x: not the URL of a Valkey server"):
        ValkeyStore("http://x")


def test_without_the_client_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "valkey", None)
    with pytest.raises(CmxError, match=r"pip install 'cmx_jax\[valkey\]'"):
        ValkeyStore("valkey://127.0.0.1")
