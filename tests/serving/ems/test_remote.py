"""A store over TCP is the same store; what is wrong on the wire is refused, in time, and nothing stops."""

import json
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from serving.ems.stores import (
    SECRET,
    eventually,
    free_port,
    keeps_the_contract,
    key,
    payload,
    server,
)

from cmx_jax.errors import CmxError
from cmx_jax.serving.ems import CacheServer, MPServer, RemoteStore, frames, serve
from cmx_jax.serving.ems.frames import META_LIMIT


@pytest.fixture
def node(tmp_path: Path) -> Iterator[MPServer]:
    node = server(tmp_path)
    yield node
    node.close()


@pytest.fixture
def listener(node: MPServer) -> Iterator[CacheServer]:
    listener = serve(node, secret=SECRET, timeout=1.0, body_limit=1 << 20)
    yield listener
    listener.stop()


Clients = Callable[..., RemoteStore]


@pytest.fixture
def client() -> Iterator[Clients]:
    stores: list[RemoteStore] = []

    def connect(listener: CacheServer, **options: object) -> RemoteStore:
        address = f"127.0.0.1:{listener.port}"
        stores.append(RemoteStore(address, **{"secret": SECRET, "timeout": 2.0, **options}))
        return stores[-1]

    yield connect
    for store in stores:
        store.close()


def raw(listener: CacheServer) -> socket.socket:
    return socket.create_connection(("127.0.0.1", listener.port), 5)


def rest(sock: socket.socket) -> bytes:
    """All that comes until the other side closes."""
    parts = []
    try:
        while part := sock.recv(65536):
            parts.append(part)
    except ConnectionResetError:
        pass
    return b"".join(parts)


def test_store_contract(client: Clients, listener: CacheServer) -> None:
    store = client(listener)
    keeps_the_contract(store, "dram")


def test_remote_store_threads(client: Clients, listener: CacheServer) -> None:
    """Many threads may share a client."""
    store, wrong = client(listener), []

    def work(n: int) -> None:
        for i in range(20):
            store.put("one", key(n), payload(n, 5000))
            wrong.extend([] if store.get("one", key(n)) == (payload(n, 5000), "dram") else [(n, i)])

    threads = [threading.Thread(target=work, args=(n,)) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert not wrong
    assert store.stats()["puts"] == 8


def test_remote_store_wrong_secret(client: Clients, listener: CacheServer, node: MPServer) -> None:
    """The wrong secret is refused."""
    store = client(listener, secret="another one")
    with pytest.raises(
        PermissionError, match=rf"127.0.0.1:{listener.port}: the cache server does not share our secret"
    ):
        store.put("one", key(1), b"")
    assert node.stats()["puts"] == 0


def test_cache_server_unanswered_challenge(listener: CacheServer, node: MPServer) -> None:
    """A client that does not answer the challenge is not served."""
    node.put("one", key(1), b"a payload")
    meta = json.dumps({"op": "get", "namespace": "one", "key": key(1).hex()}).encode()
    with raw(listener) as sock:
        sock.sendall(struct.pack("<4sIQ", b"CMX1", len(meta), 0) + meta)
        message = rest(sock)
    assert b'{"answer": null}' in message
    assert b"a payload" not in message


def test_remote_store_server_without_secret() -> None:
    """It has a client answer the challenge that it was given itself, on another connection."""
    with socket.create_server(("127.0.0.1", 0)) as impostor:
        address = f"127.0.0.1:{impostor.getsockname()[1]}"
        refused: list[str] = []

        def ask() -> None:
            with pytest.raises(OSError, match=address) as raised:
                RemoteStore(address, secret=SECRET, timeout=5).get("one", key(1))
            refused.append(raised.typename)

        victims = [threading.Thread(target=ask) for _ in range(2)]
        for victim in victims:
            victim.start()
        with impostor.accept()[0] as first, impostor.accept()[0] as second:
            frames.send(first, {"nonce": "0"}, b"", 5)
            frames.send(second, {"nonce": frames.receive(first, 5, 0)[0]["nonce"]}, b"", 5)
            frames.send(first, {"answer": frames.receive(second, 5, 0)[0]["answer"]}, b"", 5)
            frames.send(second, {"answer": None}, b"", 5)
            for victim in victims:
                victim.join(10)
        assert refused == ["PermissionError"] * 2


@pytest.mark.parametrize(("sent", "message"), [
    (struct.pack("<4sIQ", b"CMX1", 2, 1) + b"{}", b"bytes, at most"),
    (b"GET / HTTP/1.1\r\nHost: x\r\n\r\n", b"a frame begins with b'GET '"),
    (struct.pack("<4sIQ", b"CMX1", META_LIMIT + 1, 0), b"bytes, at most"),
    (struct.pack("<4sIQ", b"CMX1", 2, 1 << 62) + b"{}", b"bytes, at most"),
    (struct.pack("<4sIQ", b"CMX1", 2, 0) + b"\xff{", b"not JSON"),
    (struct.pack("<4sIQ", b"CMX1", 2, 0) + b"[]", b"not a JSON object"),
    (struct.pack("<4sIQ", b"CMX1", 50_000, 0) + b"[" * 50_000, b"not JSON"),
])  # fmt: skip
def test_cache_server_invalid_frame(
    client: Clients, listener: CacheServer, sent: bytes, message: bytes
) -> None:
    with raw(listener) as sock:
        sock.sendall(sent)
        assert message in rest(sock)
    assert client(listener).put("one", key(1), b"served all the same")


@pytest.mark.parametrize("drip", [b"", b"C"], ids=["silent", "dripping"])
def test_cache_server_slow_client(listener: CacheServer, drip: bytes) -> None:
    """The connection of a slow client is closed."""
    start = time.monotonic()
    with raw(listener) as sock:
        sock.settimeout(0.2)
        assert b"nonce" in sock.recv(1000)
        for _ in range(30):
            try:
                sock.sendall(drip)
                if sock.recv(1000) == b"":
                    break
            except TimeoutError:
                continue
            except ConnectionError:
                break
    assert 0.5 < time.monotonic() - start < 4


def test_cache_server_idle_connection(node: MPServer, client: Clients) -> None:
    """An idle connection is kept longer than an answer may take."""
    listener = serve(node, secret=SECRET, timeout=0.2, idle=30)
    store = client(listener)
    store.put("one", key(1), b"a payload")
    (connection,) = store._idle
    time.sleep(0.5)
    assert store.get("one", key(1)) == (b"a payload", "dram")
    assert store._idle == [connection]
    listener.stop()


@pytest.mark.parametrize(("meta", "message"), [
    ({"op": "burn", "namespace": "one", "key": key(1).hex()}, "operation 'burn' is not known"),
    ({"op": "get", "namespace": "../one", "key": key(1).hex()}, "namespace '../one', expected"),
    ({"op": "get", "namespace": "one", "key": "00"}, "key of 1 bytes"),
    ({"op": "get", "namespace": "one", "key": "no hex"}, "non-hexadecimal"),
    ({"op": "get"}, "namespace"),
    ({}, "op"),
])  # fmt: skip
def test_cache_server_invalid_request(
    client: Clients, listener: CacheServer, meta: dict, message: str
) -> None:
    """Invalid requests are answered with an error."""
    store = client(listener)
    with pytest.raises(ConnectionError, match=f"the cache server says: .*{message}"):
        store._request(meta, b"")
    assert store.put("one", key(1), b"the connection goes on")


def test_cache_server_damaged_block(client: Clients, listener: CacheServer, node: MPServer) -> None:
    """A block that is damaged in transit is not stored."""
    store = client(listener)
    meta = {"op": "put", "namespace": "one", "key": key(1).hex()}
    assert store._request(meta, b"no block")[0] == {"done": False}
    assert not node.exists("one", key(1))


def test_remote_store_block_above_limit(client: Clients, listener: CacheServer) -> None:
    """Blocks above the limit are refused."""
    assert not client(listener, body_limit=1000).put("one", key(1), payload(1, 1000))
    with pytest.raises(ConnectionError):  # a client that knows less than the server allows
        client(listener).put("one", key(1), bytes(2 << 20))
    assert client(listener).put("one", key(1), b"small")


def test_remote_store_reconnects(client: Clients, node: MPServer) -> None:
    """A client reconnects to a server that is back."""
    listener = serve(node, secret=SECRET)
    store = client(listener)
    assert store.put("one", key(1), b"kept")
    listener.stop()
    with pytest.raises(ConnectionError):
        store.get("one", key(1))
    restarted = serve(node, secret=SECRET, port=listener.port)
    assert store.get("one", key(1)) == (b"kept", "dram")
    restarted.stop()
    another = serve(node, secret=SECRET, port=listener.port)  # the client's connection is of the one before
    assert store.get("one", key(1)) == (b"kept", "dram")
    another.stop()


def test_remote_store_timeout() -> None:
    """A server that does not answer costs no more than the timeout."""
    with socket.create_server(("127.0.0.1", 0)) as deaf:
        store = RemoteStore(f"127.0.0.1:{deaf.getsockname()[1]}", secret=SECRET, timeout=0.3)
        start = time.monotonic()
        with pytest.raises(TimeoutError):
            store.get("one", key(1))
        assert time.monotonic() - start < 3


def test_cache_server_stop(client: Clients, node: MPServer) -> None:
    """A stopping server answers the requests that it received, and leaves no thread."""
    before = threading.active_count()
    listener = serve(node, secret=SECRET, idle=600)
    stores = [client(listener) for _ in range(3)]
    for n, store in enumerate(stores):
        assert store.put("one", key(n), payload(n))
    start = time.monotonic()
    listener.stop()
    assert time.monotonic() - start < 2
    eventually(lambda: threading.active_count() == before)
    assert node.get("one", key(2)) == (payload(2), "dram")


@pytest.mark.parametrize(
    "address", ["", "localhost", ":7000", "host:0", "host:70000", "host:x", "a..b:1", f"{'a' * 70}:1"]
)
def test_remote_store_invalid_address(address: str) -> None:
    """Invalid addresses are refused."""
    with pytest.raises(CmxError, match="expected HOST:PORT"):
        RemoteStore(address, secret=SECRET)


def test_serve_invalid(node: MPServer) -> None:
    with pytest.raises(CmxError, match="needs a secret"):
        serve(node, secret="")
    with pytest.raises(CmxError, match="cannot be listened on"):
        serve(node, secret=SECRET, host="192.0.2.1")
    with pytest.raises(CmxError, match="cannot be listened on"):
        serve(node, secret=SECRET, port=70_000)
    port = free_port()
    with socket.create_server(("127.0.0.1", port)), pytest.raises(CmxError, match="cannot be listened on"):
        serve(node, secret=SECRET, port=port)
