"""Layouts side by side: one document, and tables, plots and a page with its numbers."""

import importlib.util
import json
import re
from dataclasses import asdict, replace
from functools import partial
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from reference.dense import greedy
from support import BASE

from cmx_jax.analysis.compare.comparison import Comparison, Measurement
from cmx_jax.analysis.compare.comparison_tables import render
from cmx_jax.analysis.compare.html import page
from cmx_jax.analysis.compare.layouts import compare
from cmx_jax.analysis.compare.measured_step import Measure
from cmx_jax.analysis.compare.plots import plots
from cmx_jax.analysis.writing import Destination
from cmx_jax.cli import main
from cmx_jax.errors import CmxError
from cmx_jax.mesh import expert_parallel
from cmx_jax.mesh.named_layouts import NamedLayout


@pytest.fixture(scope="module")
def r1() -> Comparison:
    return compare("deepseek-r1", ["ep320", "ep160"])


def test_layouts_share_the_step_of_the_first(r1: Comparison) -> None:
    assert (r1.step, r1.batch, r1.context) == ("decode", 96, 4096)
    dies, npus = r1.layouts
    assert [(row.ranks, row.sequences) for row in (dies, npus)] == [(320, 96 * 160), (160, 96 * 160)]
    assert npus.memory["attention"] == dies.memory["attention"]  # data-parallel: on every rank
    assert npus.memory["cache"] == 2 * dies.memory["cache"]
    for row in (dies, npus):
        sent = np.array(row.node_traffic)
        assert sent.shape == (20, 20)
        assert sent.sum() == pytest.approx(row.ranks * sum(m.wire_bytes for m in row.moved), rel=1e-12)
        assert row.measured is None


def test_json_has_the_documented_keys_in_order(r1: Comparison, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["compare", "deepseek-r1", "--layouts", "ep320,ep160", "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    for row, other in zip(document["layouts"], r1.layouts, strict=True):
        row["seconds"] = other.seconds  # these alone differ from run to run
    assert document == json.loads(json.dumps(r1.as_dict()))
    assert list(document) == [
        *("model", "step", "batch", "context", "num_speculative_tokens", "source", "target", "layouts")
    ]
    row = document["layouts"][0]
    assert list(row) == [
        *("name", "about", "machine", "ranks", "ranks_per_npu", "sequences", "moved", "flops", "memory"),
        *("program", "seconds", "node_traffic", "measured", "predicted_ms", "notes"),
    ]
    assert row["machine"] == {"name": "CloudMatrix384", "nodes": 48, "hbm_gb_per_npu": 128}
    assert {tuple(moved) for moved in row["moved"]} == {("axes", "plane", "payload_bytes", "wire_bytes")}
    assert list(asdict(Measurement("lanes", 0.5, 8, 8))) == ["runner", "step_s", "tokens", "tokens_equal"]


@pytest.mark.slow
def test_tokens_of_a_decode_step_are_compared_with_a_single_rank() -> None:
    run = Measure(BASE, "decode", context=12, drafts=0, runner="lanes")
    run.expected = [list(greedy(BASE, prompt, 8)) for prompt in run.prompts(3)]
    run.expected[1][5] += 1
    result = run(expert_parallel(2, 16, exchange="allgather"), sequences=3)
    assert (result.tokens, result.tokens_equal) == (3 * 8, 3 * 8 - 1)
    assert result.step_s > 0


@pytest.mark.slow
def test_prefill_runs_on_ranks_that_share_sequences() -> None:
    shared = NamedLayout(partial(expert_parallel, 3, share_sequences=True), "prefill", 1, 1, "three ranks")
    comparison = compare(str(BASE), {"shared": shared}, context=30)
    [row] = comparison.layouts
    assert row.measured is not None
    assert (row.measured.tokens, row.measured.tokens_equal) == (3, 3)
    assert {m.axes for m in row.moved} == {"ep"}
    assert "3 of 3" in render(comparison)


def test_step_too_large_for_memory_is_not_run() -> None:
    [row] = compare(str(BASE), ["ep4"], batch=2**12, context=64).layouts
    assert row.measured is None
    assert "give a smaller --batch or --context" in row.notes[-1]


@pytest.mark.parametrize(
    ("layouts", "fields", "message"),
    [
        (["ep8", "ep8"], {}, "layout 'ep8' is given twice"),
        ([], {}, "no layout is given"),
        (["ep320", "ep32"], {}, "layout ep32: a layout whose ranks share sequences can prefill only"),
        (["ep160", "ep320"], {"batch": 3}, "layout ep320: batch is 3, expected a positive multiple"),
        (["ep8"], {"step": "train"}, "step 'train', expected one of"),
        (["ep8"], {"runner": "wheels"}, "runner 'wheels', expected one of"),
        (["ep8"], {"source": "hearsay"}, "source 'hearsay', expected one of"),
        (["ep8"], {"num_speculative_tokens": -1}, "num_speculative_tokens is -1, expected 0 to 16"),
    ],
)
def test_mistakes(layouts: list[str], fields: dict[str, Any], message: str) -> None:
    with pytest.raises(CmxError, match=re.escape(message)):
        compare("deepseek-r1", layouts, **fields)


def test_tables_have_every_layout_and_fit_the_terminal(r1: Comparison) -> None:
    copies = [replace(r1.layouts[1], name=f"other{i}") for i in range(7)]
    text = render(replace(r1, layouts=r1.layouts + copies))
    assert max(map(len, text.splitlines())) <= 100
    assert text.count("  experts ") > 1  # columns go on below
    assert {row.name for row in copies} <= set(text.split())
    assert re.search(r"ep across nodes +19\.10 +4\.760", text)


@pytest.fixture
def renamed(r1: Comparison) -> Comparison:
    """Has names that no file, page or formula should take as they are."""
    dies, npus = r1.layouts
    moved = [replace(npus.moved[0], axes="a<b"), *npus.moved[1:]]
    return replace(r1, layouts=[dies, replace(npus, name="<b>&$x^2$/..", moved=moved)])


class Page(HTMLParser):
    def __init__(self, text: str):
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))


def test_page_is_one_file_with_valid_links(renamed: Comparison) -> None:
    text = page(renamed)
    tags = Page(text).tags
    ids = [attrs["id"] for _, attrs in tags if "id" in attrs]
    assert len(ids) == len(set(ids))
    links = [value for _, attrs in tags for name, value in attrs.items() if name.endswith(("href", "src"))]
    assert all(link.startswith(("#", "data:image/png;base64,")) for link in links)
    used = {link[1:] for link in links if link[0] == "#"} | set(re.findall(r"url\(#([^)]*)\)", text))
    assert used <= set(ids)
    assert not {"script", "link", "b/"} & {tag for tag, _ in tags}
    assert sum(tag == "svg" for tag, _ in tags) == 3 + len(renamed.layouts)
    assert "&lt;b&gt;&amp;$x^2$/.." in text
    assert "#010203" not in text  # all ink is the page's
    assert "http" not in text
    assert "&lt;svg" not in text  # figures are not escaped


def test_plots_draw_the_numbers_of_the_comparison(r1: Comparison) -> None:
    drawn = plots(r1)
    for name, part in (("sent", "wire_bytes"), ("useful", "payload_bytes")):
        [axes] = drawn[name].axes
        expected = [sum(getattr(m, part) for m in row.moved) / 1e9 for row in r1.layouts]
        assert [bar.get_width() for bar in axes.patches] == pytest.approx(expected)
    memory = [row.memory for row in r1.layouts]
    widths = sum(bar.get_width() for bar in drawn["memory"].axes[0].patches)
    assert widths == pytest.approx(sum(sum(parts.values()) for parts in memory) / 1e9)
    shown = drawn["traffic-ep320"].axes[0].images[0].get_array()
    assert shown.shape == (48, 48)
    sent = np.array(r1.layouts[0].node_traffic) / 1e9
    assert shown[:20, :20].tolist() == pytest.approx(sent)
    assert shown[20:].mask.all()


def test_files_are_written_whole_or_not_at_all(
    renamed: Comparison, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    report = tmp_path / "report.html"
    report.write_text("before")
    to = Destination(str(report), str(tmp_path))
    with monkeypatch.context() as broken:

        def full(path: Path, content: bytes) -> None:
            with path.open("wb") as file:
                file.write(content[:9])
            raise OSError(28, "No space left on device")

        broken.setattr(Path, "write_bytes", full)
        with pytest.raises(CmxError, match="cannot be written: No space left on device"):
            to.write(renamed)
    assert [path.name for path in tmp_path.iterdir()] == ["report.html"]
    assert report.read_text() == "before"
    to.write(renamed)
    names = {path.name for path in tmp_path.iterdir()}
    assert {"report.html", "sent.png", "sent.svg", "memory.png", "traffic-ep320.svg"} <= names
    assert "traffic-_b___x_2__...png" in names
    assert (tmp_path / "useful.png").read_bytes().startswith(b"\x89PNG")
    assert report.read_text().startswith("<!doctype html>")


@pytest.mark.parametrize(
    ("paths", "message"),
    [
        ({"html": "/nowhere/x.html"}, "/nowhere is not a directory"),
        ({"html": "/"}, "/ is a directory, expected a file"),
        ({"folder": "/nowhere/plots"}, "/nowhere is not a directory"),
    ],
)
def test_paths_that_cannot_be_written_are_refused_at_once(paths: dict[str, str], message: str) -> None:
    with pytest.raises(CmxError, match=message):
        Destination(**paths)


def test_missing_matplotlib_is_named_with_its_extra(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    with pytest.raises(CmxError, match=re.escape("pip install 'cmx_jax[plots]'")):
        Destination(folder=str(tmp_path))
