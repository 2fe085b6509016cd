"""A server holds what was put, as far as its limits say, through restarts, crashes and full disks."""

import os
import resource
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from multiprocessing.shared_memory import SharedMemory
from pathlib import Path

import pytest
from serving.ems.stores import keeps_the_contract, key, payload, server

from cmx_jax.errors import CmxError
from cmx_jax.serving.ems import MPServer
from cmx_jax.serving.ems.dram import SEGMENTS
from cmx_jax.serving.ems.store import OVERHEAD, seal


@pytest.fixture
def node(tmp_path: Path) -> Iterator[MPServer]:
    node = server(tmp_path)
    yield node
    node.close()


def file_of(folder: Path, namespace: str, n: int) -> Path:
    return folder / namespace / key(n).hex()[:2] / key(n).hex()


def scribble(node: MPServer, old: bytes, new: bytes) -> None:
    """Changes bytes of the segment, as another process could."""
    segment = SharedMemory(node.stats()["dram"]["segment"])
    offset = bytes(segment.buf).index(old)
    segment.buf[offset : offset + len(new)] = new
    segment.close()


def test_store_contract(node: MPServer) -> None:
    keeps_the_contract(node, "dram")


def test_server_damaged_dram(node: MPServer) -> None:
    """A damaged copy in DRAM is dropped, and the block is read from disk."""
    node.put("one", key(1), b"a payload that is found")
    scribble(node, b"a payload", b"A")
    assert node.get("one", key(1)) == (b"a payload that is found", "disk")
    assert node.get("one", key(1)) == (b"a payload that is found", "dram")
    assert node.stats()["bad"] == 1
    assert node.stats()["misses"] == 0


@pytest.mark.parametrize("offset", [0, 4, 6, 14, 46, 78, 85], ids=str)
def test_server_damaged_file(tmp_path: Path, offset: int) -> None:
    """A damaged file is a miss and is removed."""
    server(tmp_path).close()
    path = file_of(tmp_path, "one", 1)
    path.parent.mkdir(parents=True)
    block = bytearray(seal(key(1), b"payload!"))
    block[offset] ^= 16
    path.write_bytes(block)
    node = server(tmp_path)
    assert node.exists("one", key(1))
    assert node.get("one", key(1)) is None
    assert (node.stats()["bad"], node.stats()["misses"], node.stats()["disk"]["blocks"]) == (1, 1, 0)
    assert not path.exists()
    assert node.put("one", key(1), b"payload!")
    assert node.get("one", key(1)) == (b"payload!", "dram")
    node.close()


def test_server_misplaced_file(tmp_path: Path) -> None:
    """A file in the place of another block is a miss."""
    node = server(tmp_path)
    node.put("one", key(1), b"first")
    node.close()
    place = file_of(tmp_path, "one", 2)
    place.parent.mkdir(parents=True, exist_ok=True)
    shutil.copy(file_of(tmp_path, "one", 1), place)
    node = server(tmp_path)
    assert node.get("one", key(2)) is None
    assert node.get("one", key(1)) == (b"first", "disk")
    node.close()


def test_server_removed_file(tmp_path: Path) -> None:
    """A file that was removed from outside is a miss."""
    node = server(tmp_path, dram=1)
    node.put("one", key(1), b"first")
    file_of(tmp_path, "one", 1).unlink()
    assert node.get("one", key(1)) is None
    assert not node.exists("one", key(1))
    node.close()


def test_server_put_during_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A block that is stored again while it is read stays."""
    node = server(tmp_path, dram=1)
    node.put("one", key(1), b"payload")

    def interrupted(name: tuple[str, bytes]) -> bytes | None:
        monkeypatch.undo()
        node.delete("one", key(1))
        content = node._disk.read(name)
        node.put("one", key(1), b"payload")
        return content

    monkeypatch.setattr(node._disk, "read", interrupted)
    assert node.get("one", key(1)) is None
    assert node.get("one", key(1)) == (b"payload", "disk")
    assert node.stats()["bad"] == 0
    node.close()


def test_server_restart(tmp_path: Path) -> None:
    """A restarted server finds all blocks and removes leftovers."""
    node = server(tmp_path)
    for n in range(20):
        node.put("one", key(n), payload(n))
    before = node.stats()
    node.close()
    leftover = file_of(tmp_path, "one", 3).parent / "half.tmp"
    leftover.write_bytes(b"CMXB")
    (tmp_path / "README").write_text("nothing of ours")
    (tmp_path / "one" / "ab").mkdir(exist_ok=True)
    (tmp_path / "one" / "ab" / "notes").write_text("nothing of ours")
    (tmp_path / "one" / "ab" / ("cd" * 32)).write_text("nothing that we would find again")
    node = server(tmp_path)
    assert not leftover.exists()
    assert (tmp_path / "README").exists()
    assert node.stats()["disk"] == before["disk"]
    assert node.stats()["namespaces"] == before["namespaces"]
    assert node.stats()["dram"]["blocks"] == 0
    assert [node.get("one", key(n)) for n in range(20)] == [(payload(n), "disk") for n in range(20)]
    assert [node.get("one", key(n)) for n in range(20)] == [(payload(n), "dram") for n in range(20)]
    node.close()


def test_server_restart_order(tmp_path: Path) -> None:
    """A restarted server keeps the order of use."""
    size = 1000 + OVERHEAD
    node = server(tmp_path)
    for n in range(30):
        node.put("one", key(n), payload(n))
    node.get("one", key(0))
    node.close()
    node = server(tmp_path, disk=10 * size, low=0.5, high=0.9)
    assert [n for n in range(30) if node.exists("one", key(n))] == [0, 26, 27, 28, 29]
    node.close()


def test_server_watermarks(tmp_path: Path) -> None:
    """Watermarks and quotas are used exactly."""
    size = 1000 + OVERHEAD
    node = server(tmp_path, disk=10 * size, low=0.5, high=0.8, quotas={"two": 2 * size})
    for n in range(8):
        node.put("one", key(n), payload(n))
    assert node.stats()["evictions"] == {"dram": 0, "disk": 0, "quota": 0}
    node.put("one", key(8), payload(8))
    assert [n for n in range(9) if node.exists("one", key(n))] == [4, 5, 6, 7, 8]
    for n in range(3):
        node.put("two", key(n), payload(n))
    assert [n for n in range(3) if node.exists("two", key(n))] == [1, 2]
    assert node.stats()["evictions"] == {"dram": 0, "disk": 4, "quota": 1}
    assert node.stats()["namespaces"]["two"] == {"bytes": 2 * size, "blocks": 2, "quota": 2 * size}
    node.close()


def test_server_dram_eviction(tmp_path: Path) -> None:
    """DRAM keeps the most recently used blocks, whatever their size."""
    size = 1000 + OVERHEAD
    node = server(tmp_path, dram=4 * size, low=0.75, high=0.75)
    for n in range(3):
        node.put("one", key(n), payload(n))
    assert node.get("one", key(0)).tier == "dram"
    node.put("one", key(3), payload(3))
    assert [node.get("one", key(n)).tier for n in (0, 2, 3)] == ["dram"] * 3
    assert node.get("one", key(1)).tier == "disk"  # and back in DRAM, in the place of 0
    node.put("one", key(4), payload(4, 3 * size - OVERHEAD))  # a partition of all three, joined
    assert node.get("one", key(4)).tier == "dram"
    assert node.stats()["dram"] == {"bytes": 3 * size, "blocks": 1} | {
        "segment": node.stats()["dram"]["segment"]
    }
    assert [node.get("one", key(n)).payload for n in range(4)] == [payload(n) for n in range(4)]
    node.close()


CRASH = """
import sys; from pathlib import Path; sys.path.insert(0, sys.argv[2])
from serving.ems.stores import key, payload, server
node = server(Path(sys.argv[1]), disk=64 << 20)
for n in range(1000):
    assert node.put("one", key(n), payload(n, 50_000))
    print(n, flush=True)
"""


def test_server_killed_during_put(tmp_path: Path) -> None:
    """A process that is killed during a put loses no block."""
    tests = str(Path(__file__).parents[2])
    folder = tmp_path / "blocks"
    command = [sys.executable, "-c", CRASH, str(folder), tests]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
        done = [int(process.stdout.readline()) for _ in range(8)]
        process.kill()
        done += [int(line) for line in process.stdout]
    node = server(folder, disk=64 << 20)
    assert all(node.get("one", key(n)) == (payload(n, 50_000), "disk") for n in done)
    count = node.stats()["disk"]["blocks"]
    assert count in (len(done), len(done) + 1)  # one may have been whole before it could be told
    assert node.stats()["bad"] == 0
    assert len([path for path in folder.rglob("*") if path.is_file()]) == count
    node.close()


@pytest.mark.skipif(not SEGMENTS.is_dir(), reason="segments have no files on this system")
def test_server_stale_segment(tmp_path: Path) -> None:
    """Shared memory segments do not leak, and stale ones are replaced."""
    node = server(tmp_path)
    segment = SEGMENTS / node.stats()["dram"]["segment"]
    assert segment.stat().st_size == 1 << 20
    node.close()
    node.close()
    assert not segment.exists()
    segment.write_bytes(b"of a process that was killed together with its tracker")
    node = server(tmp_path)
    assert segment.stat().st_size == 1 << 20
    node.close()
    assert not segment.exists()


@pytest.mark.skipif(not SEGMENTS.is_dir(), reason="segments have no files on this system")
def test_server_without_close(tmp_path: Path) -> None:
    """A process that does not close its server leaves no segment."""
    code = (
        "import sys; from pathlib import Path; from cmx_jax.serving.ems import MPServer\n"
        "node = MPServer(Path(sys.argv[1]), dram=1 << 16, disk=1 << 20)\n"
        "print(node.stats()['dram']['segment'])"
    )
    done = subprocess.run([sys.executable, "-c", code, tmp_path], capture_output=True, text=True, check=True)
    assert done.stderr == ""
    assert not (SEGMENTS / done.stdout.strip()).exists()


def test_server_folder_in_use(node: MPServer, tmp_path: Path) -> None:
    """A folder is used by one server at a time."""
    with pytest.raises(CmxError, match="another cache server has this folder"):
        server(tmp_path)
    assert node.put("one", key(1), b"still works")


@pytest.mark.skipif(not SEGMENTS.is_dir(), reason="what is free is not known on this system")
def test_server_not_enough_shared_memory(tmp_path: Path) -> None:
    """More shared memory than exists is refused."""
    memory = os.statvfs(SEGMENTS)
    with pytest.raises(CmxError, match="give the DRAM tier less"):
        server(tmp_path, dram=memory.f_blocks * memory.f_frsize + (1 << 30))
    server(tmp_path).close()


@pytest.mark.parametrize(("options", "message"), [
    ({"dram": 0}, "tier of 0 bytes"),
    ({"disk": -5}, "tier of -5 bytes"),
    ({"low": 0.9, "high": 0.8}, "watermarks 0.9 and 0.8, expected"),
    ({"high": 1.5}, "watermarks 0.85 and 1.5, expected"),
    ({"quotas": {"one": 0}}, "quota of one is 0 bytes"),
    ({"quotas": {"a/b": 5}}, "namespace 'a/b'"),
])  # fmt: skip
def test_server_invalid_limits(tmp_path: Path, options: dict, message: str) -> None:
    """Invalid limits are refused."""
    with pytest.raises(CmxError, match=message):
        server(tmp_path, **options)
    server(tmp_path).close()  # nothing is held by what was refused


def test_server_invalid_folder(tmp_path: Path) -> None:
    """A folder that cannot be made is reported."""
    (tmp_path / "file").write_text("")
    with pytest.raises(CmxError, match="no folder for blocks"):
        server(tmp_path / "file" / "blocks")


def test_server_closed(node: MPServer) -> None:
    """Operations of a closed server are refused."""
    node.close()
    with pytest.raises(CmxError, match="is closed"):
        node.get("one", key(1))


def test_server_write_failure(node: MPServer, tmp_path: Path) -> None:
    node.put("one", key(1), payload(1))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, hard))  # the write fails in its middle
    try:
        assert not node.put("one", key(2), payload(2, 100_000))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    (tmp_path / "two").write_text("a file where a folder should be")
    assert not node.put("two", key(3), payload(3))
    assert node.stats()["refused"] == 2
    assert "two" in node.stats()["disk"]["error"]
    assert not list(tmp_path.rglob("*.tmp"))
    assert node.get("one", key(2)) is None
    assert node.get("one", key(1)) == (payload(1), "dram")
    assert node.put("one", key(2), payload(2, 100_000))


def test_disk_full(tmp_path: Path) -> None:
    command = ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", tmp_path]
    if sys.platform != "linux" or os.getuid() or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("only root may mount a small disk")
    try:
        node = server(tmp_path)
        stored = [n for n in range(40) if node.put("one", key(n), payload(n, 10_000))]
        assert 5 < len(stored) < 26
        assert node.stats()["refused"] == 40 - len(stored)
        assert "No space left" in node.stats()["disk"]["error"]
        assert all(node.get("one", key(n)).payload == payload(n, 10_000) for n in stored)
        assert not list(tmp_path.rglob("*.tmp"))
        node.close()
    finally:
        subprocess.run(["umount", "-l", tmp_path], check=True)


def test_blocks_too_large_for_a_tier(tmp_path: Path) -> None:
    node = server(tmp_path, dram=1000, disk=5000, quotas={"small": 500}, low=0.8, high=0.9)
    assert node.put("one", key(1), payload(1, 2000))
    assert node.get("one", key(1)) == (payload(1, 2000), "disk")
    assert node.stats()["dram"]["blocks"] == 0
    assert not node.put("one", key(2), payload(2, 4000 - OVERHEAD + 1))
    assert not node.put("small", key(3), payload(3, 500 - OVERHEAD + 1))
    assert node.put("small", key(4), payload(4, 500 - OVERHEAD))
    assert node.stats()["refused"] == 2
    node.close()


def test_threads(tmp_path: Path) -> None:
    """Eight threads use the same few keys of a server that evicts all the time: never a wrong answer."""
    node = server(tmp_path, dram=20_000, disk=60_000)
    wrong: list[object] = []

    def work(seed: int) -> None:
        for i in range(150):
            n = (seed * 7 + i * 13) % 40
            if i % 3:
                hit = node.get("one", key(n))
                wrong.extend([n] if hit and hit.payload != payload(n, 2000) else [])
            elif i % 15:
                node.put("one", key(n), payload(n, 2000))
            else:
                node.delete("one", key(n))

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    stats = node.stats()
    assert not wrong
    assert stats["bad"] == 0
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(files) == stats["disk"]["blocks"]
    assert sum(path.stat().st_size for path in files) == stats["disk"]["bytes"]
    node.close()
