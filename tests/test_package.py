"""The house: imports go one way, importing is light, the shipped checkpoint is small."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import cmx_jax
from cmx_jax.serving.model import locate

ROOT = Path(cmx_jax.__file__).parent
FLOORS = ("errors", "quant", "mesh", "model", "serving", "cli", "testing")


def imports(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        modules = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        modules += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        found |= {m.split(".")[1] for m in modules if m.startswith("cmx_jax.")}
    return found


@pytest.mark.parametrize("path", sorted(ROOT.glob("*/**/*.py")), ids=lambda p: str(p.relative_to(ROOT)))
def test_no_import_goes_up(path: Path) -> None:
    floor = FLOORS.index(path.relative_to(ROOT).parts[0])
    assert imports(path) <= set(FLOORS[: floor + 1])


@pytest.mark.parametrize("path", sorted(ROOT.rglob("*.py")), ids=lambda p: str(p.relative_to(ROOT)))
def test_no_private_jax(path: Path) -> None:
    assert "jax._src" not in path.read_text()


def test_importing_starts_nothing() -> None:
    code = "import sys, cmx_jax, cmx_jax.cli; print('jax' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"


def test_the_shipped_checkpoint_is_at_most_24_mb() -> None:
    assert sum(path.stat().st_size for path in locate("tiny").iterdir()) <= 24e6
