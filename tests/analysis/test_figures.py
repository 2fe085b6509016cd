"""Figures of predictions: bars match their rows, and a folder that cannot be made is a one-line error."""

import importlib.util
from pathlib import Path
from typing import Any

import pytest

from cmx_jax.analysis.cost.measured import PaperRow
from cmx_jax.analysis.plan.figures import Folder, paper_errors
from cmx_jax.analysis.predict.paper import PaperReport, summary
from cmx_jax.cli import main
from cmx_jax.errors import CmxError

ROWS = [
    PaperRow("7", "dispatch", "us", 64.0, 68.0),
    PaperRow("4", "decode", "tokens/s", 50.0, 37.5, "predicted", "end to end"),
    PaperRow("4", "decode", "ms", 10.0, 20.0, "predicted", "end to end"),
]
REPORT = PaperReport(ROWS, summary(ROWS))


def test_bars_are_as_long_as_their_errors() -> None:
    figure: Any = paper_errors(REPORT)
    bars = [bar.get_width() for axes in figure.axes for bar in axes.patches]
    assert bars == [6.25, -25, 100]
    titles = [axes.get_title(loc="left") for axes in figure.axes]
    assert titles == ["operators: mean error 6.2 %", "end to end: mean error 62.5 %"]


def test_files_are_the_same_each_time(tmp_path: Path) -> None:
    read = []
    for _ in range(2):
        Folder(str(tmp_path / "new")).write("paper", paper_errors(REPORT))
        read.append({file.name: file.read_bytes() for file in (tmp_path / "new").iterdir()})
    assert sorted(read[0]) == ["paper.png", "paper.svg"]
    assert read[0] == read[1]
    assert "50 → 37.5" in read[0]["paper.svg"].decode()


def test_report_without_folder_writes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Folder(None).write("paper", None)
    assert not list(tmp_path.iterdir())


def test_bad_folders_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "file"
    file.write_text("here")
    for path in (file, tmp_path / "not" / "there"):
        with pytest.raises(CmxError, match="is not a directory: make it first"):
            Folder(str(path))
    to = Folder(str(tmp_path))
    (tmp_path / "paper.png").mkdir()
    with pytest.raises(CmxError, match=r"paper\.png cannot be written"):
        to.write("paper", paper_errors(REPORT))
    assert sorted(x.name for x in tmp_path.iterdir()) == ["file", "paper.png"]
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(CmxError, match=r"pip install 'cmx_jax\[plots\]'"):
        Folder(str(tmp_path))


def test_plots_flag_needs_paper_flag(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["predict", "--plots", str(tmp_path)]) == 2
    assert "--plots is given without --paper: give both" in capsys.readouterr().err
