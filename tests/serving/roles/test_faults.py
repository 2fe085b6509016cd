"""Processes that die, hang, leave or lose their disk while requests run: every request ends with its own
text, and what comes back is used again."""

import resource
import signal
from concurrent.futures import ThreadPoolExecutor

import pytest
from serving.ems.stores import eventually
from serving.roles.cluster import BLOCK, SECRET, Cluster, text
from serving.roles.conftest import TOKENS

from cmx_jax.serving.ems import RemoteStore

pytestmark = pytest.mark.slow


def answered(cluster: Cluster, cluster_prompts: list[list[int]]) -> list[tuple[str, int] | str]:
    with ThreadPoolExecutor(len(cluster_prompts)) as pool:
        answers = [pool.submit(cluster.ask, prompt, max_tokens=TOKENS) for prompt in cluster_prompts]
    return [text(answer) for answer in answers]


def test_workers_killed(cluster: Cluster, cluster_prompts, offline) -> None:
    """Killed workers lose no token and are used again."""
    retried = cluster.status()["retried"]
    with cluster.asked(cluster_prompts, max_tokens=TOKENS) as answers:
        for process in (cluster.decode[0], cluster.prefill[0]):
            process.kill()
        assert [text(answer) for answer in answers] == offline
    assert cluster.status()["retried"] > retried
    assert [bool(w["error"]) for w in cluster.status()["workers"]] == [True, False, True, False]
    assert answered(cluster, cluster_prompts) == offline
    cluster.heal()  # at the same ports
    assert answered(cluster, cluster_prompts) == offline
    assert cluster.prefill[0].status()["kv"]["offered"] > 1
    assert cluster.decode[0].status()["counters"]["steps"] > 0


def test_workers_hang(cluster: Cluster, cluster_prompts, offline) -> None:
    """Requests survive workers that hang."""
    hanging = cluster.decode[1], cluster.prefill[1]
    with cluster.asked(cluster_prompts, max_tokens=TOKENS) as answers:
        for process in hanging:
            process.send(signal.SIGSTOP)
        try:
            assert [text(answer) for answer in answers] == offline
            assert [bool(w["error"]) for w in cluster.status()["workers"]] == [False, True, False, True]
        finally:
            for process in hanging:
                process.send(signal.SIGCONT)
    cluster.heal()
    cluster.idle()
    assert answered(cluster, cluster_prompts) == offline


def test_workers_terminated(cluster: Cluster, cluster_prompts, offline) -> None:
    """Workers finish their requests when they are told to stop."""
    logged = len(cluster.router.log)
    leaving = cluster.decode[1], cluster.prefill[0]
    with cluster.asked(cluster_prompts, max_tokens=TOKENS) as answers:
        for process in leaving:
            process.send(signal.SIGTERM)
        assert [text(answer) for answer in answers] == offline
    for process in leaving:
        assert process.popen.wait(30) == 0
        assert "Traceback" not in process.log
    # some came a moment too late, and went to others; nothing that had begun was broken off
    retries = [line for line in cluster.router.log[logged:].splitlines() if "goes on elsewhere" in line]
    late = ("shutting down: its requests go to others", "shutting down: ask again", "All connection attempts")
    assert [line for line in retries if not any(reason in line for reason in late)] == []
    assert answered(cluster, cluster_prompts[:3]) == offline[:3]


def test_cache_server_killed(cluster: Cluster, cluster_prompts, offline) -> None:
    """It is killed, comes back with what is on its disk, and finds one of the blocks there damaged."""
    long = cluster_prompts[1]
    assert cluster.ask(long, max_tokens=TOKENS)["choices"][0]["text"] == offline[1][0]
    with cluster.asked(cluster_prompts, max_tokens=TOKENS) as answers:
        cluster.cache.kill()
        assert [text(answer) for answer in answers] == offline
    for path in (p for p in cluster.disk.rglob("*") if p.is_file()):
        data = bytearray(path.read_bytes())
        data[len(data) // 2] ^= 1
        path.write_bytes(data)
    cluster.heal()
    cached: list[int] = []

    def cached_tokens() -> int:
        answer = cluster.ask(long, max_tokens=TOKENS)
        assert answer["choices"][0]["text"] == offline[1][0]
        cached.append(answer["usage"]["prompt_tokens_details"]["cached_tokens"])
        return cached[-1]

    eventually(lambda: cached_tokens() == (len(long) - 1) // BLOCK * BLOCK, 30)
    assert cached[0] == 0  # all were damaged
    store = RemoteStore(f"127.0.0.1:{cluster.cache.port}", secret=SECRET)
    assert store.stats()["bad"] > 0
    store.close()


def test_cache_server_full_disk(cluster: Cluster, cluster_prompts, offline) -> None:
    """A full disk of the cache server causes no error."""
    limits = resource.prlimit(cluster.cache.pid, resource.RLIMIT_FSIZE, (100, resource.RLIM_INFINITY))
    store = RemoteStore(f"127.0.0.1:{cluster.cache.port}", secret=SECRET)
    refused = store.stats()["refused"]
    new = [[*prompt, 7] for prompt in cluster_prompts]
    try:
        for prompt in cluster_prompts:
            cluster.ask([8, *prompt], max_tokens=2)
        assert answered(cluster, cluster_prompts) == offline
        eventually(lambda: store.stats()["refused"] > refused)
        assert store.stats()["disk"]["error"]
    finally:
        resource.prlimit(cluster.cache.pid, resource.RLIMIT_FSIZE, limits)
        store.close()
    assert len(answered(cluster, new)) == len(new)
