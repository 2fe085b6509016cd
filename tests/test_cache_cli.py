"""`cmx cache`: a model comes out of the pool bit for bit, warm or cold; mistakes are one line."""

import filecmp
import json
from pathlib import Path

import pytest

from cmx_jax.cli import main
from cmx_jax.serving.deploy.model import locate


def test_cache_store_and_load(tmp_path: Path, capsys) -> None:
    """A model is stored and loaded."""
    pool = ["--cache-dir", str(tmp_path / "pool")]
    assert main(["cache", "store", "tiny", *pool]) == 0
    model = capsys.readouterr().out.strip()
    assert main(["cache", "load", model, str(tmp_path / "warm"), *pool, "--json"]) == 0
    warm = json.loads(capsys.readouterr().out)
    size = sum(path.stat().st_size for path in locate("tiny").iterdir())
    assert (warm["start"], warm["bytes"]) == ("warm", {"disk": size})
    assert not filecmp.dircmp(tmp_path / "warm", locate("tiny")).diff_files

    cold = ["cache", "load", model, str(tmp_path / "cold"), "--cache-dir", str(tmp_path / "other")]
    assert main(cold) == 2
    assert "is not in the pool, and no source of it was given" in capsys.readouterr().err
    assert main([*cold, "--source", "tiny"]) == 0
    assert capsys.readouterr().out.startswith("cold start: ")
    assert main(["cache", "stats", *pool, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["servers"]["here"]["namespaces"]["models"]["bytes"] > size


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["stats"], "which pool?"),
        (["store", "nowhere", "--cache-dir", "."], "neither a directory nor a model that ships"),
        (["stats", "--cache-server", "x"], "expected HOST:PORT"),
        (["stats", "--cache-dir", ".", "--cache-dram-mb", "0"], "cache_dram_mb is 0"),
        (["stats", "--cache-dir", ".", "--cache-quota", "x"], "expected NAMESPACE=MB"),
    ],
)
def test_cache_mistakes(flags: list[str], message: str, capsys, tmp_path, monkeypatch) -> None:
    """Mistakes are reported in one line."""
    monkeypatch.chdir(tmp_path)
    assert main(["cache", *flags]) == 2
    assert message in capsys.readouterr().err
