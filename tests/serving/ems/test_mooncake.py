"""The same store on a real Mooncake master.

A client keeps threads and memory to the end of its process, so each has a process of its own here.
"""

import importlib.util
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from serving.ems.stores import eventually, free_port, listening

from cmx_jax.errors import CmxError
from cmx_jax.serving.ems.mooncake import MooncakeStore

CLIENT = """
import os, signal, sys; sys.path.insert(0, sys.argv[3])
from cmx_jax.serving.ems import Pool
from cmx_jax.serving.ems.mooncake import MooncakeStore
from serving.ems.stores import keeps_the_contract, key, payload
store = MooncakeStore(sys.argv[1], segment=32 << 20, buffer=8 << 20)
"""
CONTRACT = """
keeps_the_contract(store, "mooncake")
assert not store.put("one", key(9), payload(9, 9 << 20))
assert store.stats()["refused"] == 1
assert store._client.put(f"cmx:one:{key(8).hex()}", b"no block") == 0
assert store.get("one", key(8)) is None
assert not store.exists("one", key(8))
assert store.stats()["bad"] == 1
store.close()
"""
DEAD = """
assert store.put("one", key(1), b"lost with its master")
os.kill(int(sys.argv[2]), signal.SIGKILL)
pool = Pool({"a": store}, backoff=60)
assert pool.get("one", key(1)) is None
assert not pool.put("one", key(1), b"")
stats = pool.stats()
assert (stats["failures"], stats["skipped"]) == (1, 1)
assert "Mooncake: the master cannot be reached" in stats["servers"]["a"]["error"]
os._exit(0)  # the client waits for its master when it closes
"""


def binary() -> Path | None:
    spec = importlib.util.find_spec("mooncake")
    path = Path(spec.origin).parent / "mooncake_master" if spec and spec.origin else None
    return path if path and path.exists() else None


needs_master = pytest.mark.skipif(binary() is None, reason="mooncake is not installed: cmx_jax[mooncake]")


@pytest.fixture
def master() -> Iterator[tuple[subprocess.Popen, int]]:
    try:
        import mooncake.store  # noqa: F401
    except ImportError as error:
        pytest.skip(f"mooncake needs libraries of the system: {error}")
    port, metrics = free_port(), free_port()
    options = [f"-rpc_port={port}", "-rpc_address=127.0.0.1", f"-metrics_port={metrics}"]
    command = [binary(), *options, "-metrics_host=127.0.0.1", "-logtostderr=1"]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        try:
            eventually(lambda: listening(port))
            yield process, port
        finally:
            process.kill()


@needs_master
@pytest.mark.parametrize("script", [CONTRACT, DEAD], ids=["contract", "dead"])
def test_client_reads_stream(master: tuple[subprocess.Popen, int], script: str) -> None:
    process, port = master
    arguments = [f"127.0.0.1:{port}", str(process.pid), str(Path(__file__).parents[2])]
    command = [sys.executable, "-c", CLIENT + script, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=90)
    assert done.returncode == 0, done.stderr[-3000:]


@needs_master
def test_mooncake_unreachable_master() -> None:
    """An unreachable master is reported at once."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    with pytest.raises(ConnectionRefusedError):
        MooncakeStore(f"127.0.0.1:{port}")
    with pytest.raises(CmxError, match="expected HOST:PORT"):
        MooncakeStore("127.0.0.1")


def test_without_the_package_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "mooncake.store", None)
    with pytest.raises(CmxError, match=r"pip install 'cmx_jax\[mooncake\]'"):
        MooncakeStore("127.0.0.1:50051")
