"""The house: imports go one way, importing is light, the shipped checkpoint is small."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import cmx_jax
from cmx_jax.serving.deploy.model import locate

ROOT = Path(cmx_jax.__file__).parent
WINGS = ("errors", "quant", "mesh", "model", "serving", "analysis", "cli", "testing")


def module_name(path: Path) -> str:
    parts = ("cmx_jax", *path.relative_to(ROOT).with_suffix("").parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


FILES = {module_name(path): path for path in sorted(ROOT.rglob("*.py"))}


def imported(path: Path) -> Iterator[str]:
    """Modules of the package that a file imports anywhere in it: lazily and for types only, too."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in FILES)
        elif isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "cmx_jax":
            for alias in node.names:
                name = f"{node.module}.{alias.name}"
                yield name if name in FILES else node.module


GRAPH = {name: set(imported(path)) - {name} for name, path in FILES.items()}


def folder(name: str) -> str:
    """The folder of a module; files of the root are folders of their own, as `errors` is below all others."""
    is_package = FILES[name].name == "__init__.py"
    return name if is_package or name.count(".") == 1 else name.rpartition(".")[0]


def test_imports_between_files_have_no_circle() -> None:
    TopologicalSorter(GRAPH).prepare()


def test_imports_between_folders_have_no_circle() -> None:
    between: dict[str, set[str]] = {}
    for name, targets in GRAPH.items():
        between.setdefault(folder(name), set()).update(map(folder, targets - {name}))
    TopologicalSorter({name: targets - {name} for name, targets in between.items()}).prepare()


def test_imports_go_down_the_wings() -> None:
    def wing(name: str) -> int:
        return WINGS.index(name.split(".")[1])

    up = [
        (name, target)
        for name, targets in GRAPH.items()
        for target in targets
        if name != "cmx_jax" and (target == "cmx_jax" or wing(target) > wing(name))
    ]
    # the command's own version is the package's
    assert up == [("cmx_jax.cli", "cmx_jax")]


def test_public_classes_have_different_names() -> None:
    files: dict[str, list[str]] = {}
    for name, path in FILES.items():
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                files.setdefault(node.name, []).append(name)
    assert {name: where for name, where in files.items() if len(where) > 1} == {}


def test_files_have_at_most_300_lines() -> None:
    lines = {name: path.read_text().count("\n") for name, path in FILES.items()}
    assert {name: count for name, count in lines.items() if count > 300} == {}


def test_package_uses_no_private_jax() -> None:
    assert [name for name, path in FILES.items() if "jax._src" in path.read_text()] == []


def test_importing_starts_nothing() -> None:
    code = "import sys, cmx_jax, cmx_jax.cli; print('jax' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"


def test_shipped_checkpoint_is_at_most_24_mb() -> None:
    assert sum(path.stat().st_size for path in locate("tiny").iterdir()) <= 24e6
