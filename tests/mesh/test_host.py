"""Settings that JAX has before it starts, each in a process of its own."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from cmx_jax.mesh.host import cache_directory

ROOT = Path(__file__).parents[2]
DEVICES = "import jax; print(json.dumps(len(jax.devices('cpu'))))"


def child(*lines: str, **env: str) -> subprocess.CompletedProcess[str]:
    """Runs Python statements in a new process without this one's JAX settings."""
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("JAX_", "XLA_", "CMX_"))}
    return subprocess.run(
        [sys.executable, "-W", "error", "-c", "\n".join(["import json", *lines])],
        env={**clean, "JAX_PLATFORMS": "cpu", **env},
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )


def answer(*lines: str, **env: str) -> object:
    """Returns the JSON that the statements print."""
    done = child(*lines, **env)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_request_devices_after_imports() -> None:
    """Also shows that no import starts a backend: a started one keeps its one device."""
    imports = "import cmx_jax, cmx_jax.mesh, cmx_jax.mesh.exchange, cmx_jax.quant"
    request = "cmx_jax.mesh.request_devices(5); cmx_jax.mesh.request_devices(3)"
    assert answer(imports, request, DEVICES) == 5


def test_request_devices_after_jax_has_started_is_refused() -> None:
    done = child(
        "import jax; jax.devices()",
        "from cmx_jax.mesh import request_devices; request_devices(1); request_devices(4)",
    )
    assert done.returncode == 1
    assert (
        done.stderr.strip()
        .splitlines()[-1]
        .startswith(
            "cmx_jax.errors.CmxError: JAX has already started with 1 CPU device(s), 4 are needed: call "
            "cmx_jax.mesh.request_devices(4) before the first"
        )
    )


@pytest.mark.parametrize("count", [3, 4])
def test_request_devices_with_xla_flags(count: int) -> None:
    """`XLA_FLAGS` decide; fewer devices than needed are refused."""
    flags = {"XLA_FLAGS": "--xla_force_host_platform_device_count=3"}
    done = child(f"from cmx_jax.mesh import request_devices; request_devices({count})", DEVICES, **flags)
    if count == 3:
        assert json.loads(done.stdout) == 3
    else:
        assert "CmxError: XLA_FLAGS asks for 3 host devices, 4 are needed" in done.stderr.splitlines()[-1]


def test_request_exactly_overrides_flags_until_jax_has_started() -> None:
    lines = "from cmx_jax.mesh.host import request_exactly; request_exactly(2); request_exactly(2)", DEVICES
    done = child(*lines, "request_exactly(1)", XLA_FLAGS="--xla_force_host_platform_device_count=3")
    assert done.stdout == "2\n"
    assert "already started with 2 cpu device(s), exactly 1 CPU" in done.stderr.splitlines()[-1]


@pytest.mark.parametrize(
    ("env", "expected"),
    [
        ({"CMX_CACHE_DIR": "{}/a"}, "{}/a/xla"),
        ({"CMX_CACHE_DIR": "{}/a", "JAX_COMPILATION_CACHE_DIR": "/b"}, "/b"),
        ({"CMX_CACHE_DIR": "{}/a", "JAX_ENABLE_COMPILATION_CACHE": "0"}, None),
        ({"CMX_CACHE_DIR": "{}/file/a"}, None),
    ],
    ids=["ours", "the user's", "switched off", "cannot be made"],
)
def test_compilation_cache_follows_user_settings(env, expected, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    env = {name: value.format(tmp_path) for name, value in env.items()}
    enable = "import jax; from cmx_jax.mesh import enable_compilation_cache; enable_compilation_cache()"
    kept = answer(enable, "print(json.dumps(jax.config.jax_compilation_cache_dir))", **env)
    assert kept == (expected and expected.format(tmp_path))


def test_cache_directory_default(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("CMX_CACHE_DIR", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_directory() == tmp_path / "cmx_jax"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_directory() == tmp_path / ".cache" / "cmx_jax"
