"""Figures of predictions: what is drawn is what was given, and a folder that cannot be is one line."""

import importlib.util
from pathlib import Path
from typing import Any

import pytest

from cmx_jax.analysis.plan.figures import Folder, paper_errors
from cmx_jax.cli import main
from cmx_jax.errors import CmxError

ROWS = [
    {"table": "7", "row": "dispatch", "unit": "us", "published": 100.0, "predicted": 104.0, "error": 0.04,
     "role": "calibrated", "group": "operators"},
    {"table": "4", "row": "decode", "unit": "tokens/s", "published": 50.0, "predicted": 40.0, "error": -0.2,
     "role": "predicted", "group": "end to end"},
    {"table": "4", "row": "decode", "unit": "ms", "published": 10.0, "predicted": 20.0, "error": 1.0,
     "role": "predicted", "group": "end to end"},
]  # fmt: skip


def test_a_bar_for_each_row_as_long_as_its_error() -> None:
    figure: Any = paper_errors({"rows": ROWS})
    bars = [bar.get_width() for axes in figure.axes for bar in axes.patches]
    assert bars == [4, -20, 100]
    titles = [axes.get_title(loc="left") for axes in figure.axes]
    assert titles == ["operators: mean error 4.0 %", "end to end: mean error 60.0 %"]


def test_files_are_whole_and_the_same_each_time(tmp_path: Path) -> None:
    read = []
    for _ in range(2):
        Folder(str(tmp_path / "new")).write("paper", paper_errors({"rows": ROWS}))
        read.append({file.name: file.read_bytes() for file in (tmp_path / "new").iterdir()})
    assert sorted(read[0]) == ["paper.png", "paper.svg"]
    assert read[0] == read[1]
    assert "50 → 40" in read[0]["paper.svg"].decode()


def test_nothing_is_written_where_none_is_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Folder(None).write("paper", None)
    assert not list(tmp_path.iterdir())


def test_folders_that_cannot_be(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "file"
    file.write_text("here")
    for path in (file, tmp_path / "not" / "there"):
        with pytest.raises(CmxError, match="is not a directory: make it first"):
            Folder(str(path))
    to = Folder(str(tmp_path))
    (tmp_path / "paper.png").mkdir()
    with pytest.raises(CmxError, match=r"paper\.png cannot be written"):
        to.write("paper", paper_errors({"rows": ROWS}))
    assert sorted(x.name for x in tmp_path.iterdir()) == ["file", "paper.png"]
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(CmxError, match=r"pip install 'cmx_jax\[plots\]'"):
        Folder(str(tmp_path))


def test_plots_are_the_paper_s(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["predict", "--plots", str(tmp_path)]) == 2
    assert "--plots is given without --paper: give both" in capsys.readouterr().err
