"""README and docs: commands parse, Python blocks run, and outputs that are shown are those printed."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

import cmx_jax.cli

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.M | re.S)


def blocks(*languages: str) -> list[tuple[str, str]]:
    """Name and text of each code block in one of the languages."""
    found = []
    for page in PAGES:
        for i, (language, text) in enumerate(BLOCK.findall(page.read_text())):
            if language in languages:
                found.append((f"{page.stem}-{i}", text))
    return found


COMMANDS = [
    (name, part.strip())
    for name, text in blocks("sh", "console")
    for line in text.splitlines()
    for part in line.removeprefix("$ ").split("&&")
    if part.strip().startswith("cmx ")
]


@pytest.mark.parametrize("command", sorted({command for _, command in COMMANDS}))
def test_command_parses(command: str) -> None:
    words = shlex.split(command, comments=True)[1:]
    cmx_jax.cli._parser().parse_args(words)


def test_scripts_that_are_named_exist() -> None:
    text = "\n".join(page.read_text() for page in PAGES)
    missing = {name for name in re.findall(r"\bscripts/\w+\.(?:py|sh)", text) if not (ROOT / name).exists()}
    assert missing == set()


def test_files_that_are_named_exist() -> None:
    text = "\n".join(page.read_text() for page in (*PAGES, ROOT / "ARCHITECTURE.md"))
    names = set(re.findall(r"`([\w.-]+/[\w/.-]+\.(?:py|md|json|html|yaml))`", text))
    folders = (ROOT, ROOT / "cmx_jax")  # the tour names files below the package
    assert {name for name in names if not any((folder / name).exists() for folder in folders)} == set()


@pytest.mark.slow
@pytest.mark.parametrize(("name", "text"), blocks("python"), ids=lambda value: value.split("\n")[0][:40])
@pytest.mark.slow
def test_python_block_runs(name: str, text: str, tmp_path: Path) -> None:
    file = tmp_path / ("test_block.py" if "def test_" in text else "block.py")
    file.write_text(text)
    runner = ["-m", "pytest", "-q", "-p", "no:cacheprovider"] if "def test_" in text else []
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, *runner, str(file)], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, f"{name}\n{done.stdout}\n{done.stderr}"


SHOWN = [(name, text) for name, text in blocks("console") if len(text.strip().splitlines()) > 1]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "text"), SHOWN, ids=[name for name, _ in SHOWN])
def test_output_that_is_shown_is_printed(name: str, text: str, capsys: pytest.CaptureFixture[str]) -> None:
    command, *expected = text.strip().splitlines()
    assert cmx_jax.cli.main(shlex.split(command.removeprefix("$ "), comments=True)[1:]) == 0
    printed = [line.rstrip() for line in capsys.readouterr().out.splitlines()]
    for line in expected:
        if line.strip() not in ("", "..."):
            assert line.rstrip() in printed, name


@pytest.mark.slow
def test_notebook_runs(tmp_path: Path) -> None:
    """Runs the code cells of the notebook one after the other, as one program."""
    import json

    cells = json.loads((ROOT / "docs" / "notebooks" / "first_layout.ipynb").read_text())["cells"]
    code = "\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "code")
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


def test_paper_map_is_up_to_date() -> None:
    script = ROOT / "scripts" / "make_paper_map.py"
    assert subprocess.run([sys.executable, str(script), "--check"]).returncode == 0, f"run {script}"
