"""A model comes out of the pool as it went in, or not at all."""

import filecmp
import hashlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from serving.ems.stores import server

from cmx_jax.errors import CmxError
from cmx_jax.serving.ems import Pool, load_model, models, store_model

BLOCK = 10_000


@pytest.fixture
def pool(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Pool]:
    monkeypatch.setattr(models, "BLOCK_BYTES", BLOCK)
    pool = Pool({"a": server(tmp_path / "a"), "b": server(tmp_path / "b")})
    yield pool
    pool.close()


@pytest.fixture
def source(tmp_path: Path) -> Path:
    source = tmp_path / "model"
    (source / "original").mkdir(parents=True)
    rng = np.random.default_rng(5)
    for name, size in (("a.safetensors", 55_000), ("b.safetensors", 3 * BLOCK), ("original/c", 7)):
        (source / name).write_bytes(rng.bytes(size))
    (source / "config.json").write_text("{}")
    (source / "empty").write_bytes(b"")
    return source


def same(first: Path, second: Path) -> bool:
    names = [sorted(p.relative_to(root) for p in root.rglob("*") if p.is_file()) for root in (first, second)]
    equal = filecmp.cmpfiles(first, second, names[0], shallow=False)[0]
    return names[0] == names[1] and len(equal) == len(names[0])


def test_model_round_trip(pool: Pool, source: Path, tmp_path: Path) -> None:
    """A stored model is loaded bit for bit."""
    model = store_model(pool, source, "models")
    loaded = load_model(pool, model, tmp_path / "out", "models")
    assert same(source, tmp_path / "out")
    assert loaded.nbytes == {"dram": 55_000 + 3 * BLOCK + 7 + 2}
    assert loaded.seconds > 0
    assert not list(tmp_path.glob("*.unfinished"))


def test_load_model_cold_and_warm(source: Path, tmp_path: Path) -> None:
    """A model is loaded from the source first, then from DRAM, then from disk."""
    size = sum(path.stat().st_size for path in source.rglob("*") if path.is_file())
    first = Pool({"a": server(tmp_path / "a")})
    model = store_model(first, source, "models")
    first.close()
    empty = Pool({"a": server(tmp_path / "new")})
    assert load_model(empty, model, tmp_path / "1", "models", source).nbytes == {"source": size}
    assert load_model(empty, model, tmp_path / "2", "models").nbytes == {"dram": size}
    empty.close()
    restarted = Pool({"a": server(tmp_path / "new")})
    assert load_model(restarted, model, tmp_path / "3", "models").nbytes == {"disk": size}
    restarted.close()
    assert all(same(source, tmp_path / name) for name in "123")


def test_model_versions_share_blocks(pool: Pool, source: Path) -> None:
    """The id changes with the content, and versions share blocks."""
    first = store_model(pool, source, "models")
    blocks = pool.stats()["stored"]
    assert store_model(pool, source, "models") == first
    (source / "config.json").write_text("{ }")
    second = store_model(pool, source, "models")
    stored = sum(server["disk"]["blocks"] for server in pool.stats()["servers"].values())
    assert second != first
    assert stored == blocks + 2  # the file, the manifest


def test_load_model_evicted_block(pool: Pool, source: Path, tmp_path: Path) -> None:
    """An evicted block is read from the source."""
    model = store_model(pool, source, "models")
    lost = (source / "a.safetensors").read_bytes()[BLOCK : 2 * BLOCK]
    assert pool.delete("models", hashlib.sha256(lost).digest())
    with pytest.raises(CmxError, match=r"block 1 of a\.safetensors is not in the pool, and no source"):
        load_model(pool, model, tmp_path / "out", "models")
    assert not (tmp_path / "out").exists()
    assert not list(tmp_path.glob("*.unfinished"))
    loaded = load_model(pool, model, tmp_path / "out", "models", source)
    assert loaded.nbytes["source"] == BLOCK
    assert same(source, tmp_path / "out")
    assert "source" not in load_model(pool, model, tmp_path / "again", "models").nbytes


def test_load_model_wrong_bytes(pool: Pool, source: Path, tmp_path: Path) -> None:
    """Other bytes under a block's key are not accepted."""
    model, key = store_model(pool, source, "models"), hashlib.sha256(b"{}").digest()
    pool.delete("models", key)
    pool.put("models", key, b"[]")
    with pytest.raises(CmxError, match=r"block 0 of config\.json is not in the pool"):
        load_model(pool, model, tmp_path / "out", "models")


def test_load_model_source_of_another_version(pool: Pool, source: Path, tmp_path: Path) -> None:
    """A source that holds another version is refused."""
    model = store_model(pool, source, "models")
    pool.delete("models", hashlib.sha256(b"{}").digest())
    (source / "config.json").write_text("[]")
    with pytest.raises(CmxError, match=r"config\.json: block 0 is not that of the model"):
        load_model(pool, model, tmp_path / "out", "models", source)
    pool.delete("models", bytes.fromhex(model))
    with pytest.raises(CmxError, match=rf"model: holds model [0-9a-f]+, expected {model}"):
        load_model(pool, model, tmp_path / "out", "models", source)
    assert not (tmp_path / "out").exists()


def test_load_model_invalid(pool: Pool, source: Path, tmp_path: Path) -> None:
    model = store_model(pool, source, "models")
    for identifier, message in (
        ("tiny", "expected 64 hex digits"),
        ("00" * 32, "is not in the pool, and no source"),
        (hashlib.sha256(b"{}").hexdigest(), "is not a model's manifest"),
    ):
        with pytest.raises(CmxError, match=message):
            load_model(pool, identifier, tmp_path / "out", "models")
    with pytest.raises(CmxError, match="is there already"):
        load_model(pool, model, source, "models")
    with pytest.raises(CmxError, match="is not in the pool"):
        load_model(pool, model, tmp_path / "out", "another")
    with pytest.raises(CmxError, match="no files there"):
        store_model(pool, tmp_path / "nothing", "models")


def test_load_model_files_outside_directory(pool: Pool, tmp_path: Path) -> None:
    """Files outside the directory are refused."""
    manifest = b'{"files": {"../evil": []}}'
    key = hashlib.sha256(manifest)
    pool.put("models", key.digest(), manifest)
    with pytest.raises(CmxError, match="outside its directory"):
        load_model(pool, key.hexdigest(), tmp_path / "out", "models")


def test_store_model_pool_too_small(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A pool that is too small for a model is reported."""
    monkeypatch.setattr(models, "BLOCK_BYTES", BLOCK)
    pool = Pool({"a": server(tmp_path / "a", disk=60_000)})
    with pytest.raises(CmxError, match="it needs more bytes"):
        store_model(pool, source, "models")
    pool.close()
