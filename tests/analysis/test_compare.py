"""Layouts side by side: one document, and tables, plots and a page that say what it says."""

import copy
import importlib.util
import re
from functools import partial
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from reference.dense import greedy
from support import BASE

from cmx_jax.analysis import writing as write
from cmx_jax.analysis.compare.html import page
from cmx_jax.analysis.compare.layouts import compare
from cmx_jax.analysis.compare.measure import Measure
from cmx_jax.analysis.compare.plots import plots
from cmx_jax.analysis.compare.report import render
from cmx_jax.analysis.writing import Destination
from cmx_jax.errors import CmxError
from cmx_jax.mesh import expert_parallel
from cmx_jax.mesh.named_layouts import NamedLayout


@pytest.fixture(scope="module")
def r1() -> dict[str, Any]:
    return compare("deepseek-r1", ["ep320", "ep160"])


def test_all_layouts_get_the_first_one_s_step(r1: dict[str, Any]) -> None:
    assert (r1["step"], r1["batch"], r1["context"]) == ("decode", 96, 4096)
    dies, npus = r1["layouts"]
    assert [(x["ranks"], x["sequences"]) for x in (dies, npus)] == [(320, 96 * 160), (160, 96 * 160)]
    assert npus["memory"]["attention"] == dies["memory"]["attention"]  # data-parallel: on every rank
    assert npus["memory"]["cache"] == 2 * dies["memory"]["cache"]
    for x in (dies, npus):
        sent = np.array(x["node_traffic"])
        assert sent.shape == (20, 20)
        assert sent.sum() == pytest.approx(x["ranks"] * sum(m["wire_bytes"] for m in x["moved"]), rel=1e-12)
        assert x["measured"] is None


def own(**fields: Any) -> NamedLayout:
    return NamedLayout(partial(expert_parallel, 4, **fields), "decode", 1, 1, "four ranks")


def test_a_decode_step_s_tokens_are_held_against_others() -> None:
    run = Measure(BASE, "decode", context=12, drafts=0, runner="lanes")
    run.alone = [list(greedy(BASE, prompt, 8)) for prompt in run.prompts(3)]
    run.alone[1][5] += 1
    seen = run(expert_parallel(2, 16, exchange="allgather"), sequences=3)
    assert (seen["tokens"], seen["tokens_equal"]) == (3 * 8, 3 * 8 - 1)
    assert seen["step_s"] > 0


def test_ranks_that_share_sequences_run_a_prefill_step() -> None:
    shared = NamedLayout(partial(expert_parallel, 3, share_sequences=True), "prefill", 1, 1, "three ranks")
    found = compare(str(BASE), {"shared": shared}, context=30)
    [x] = found["layouts"]
    assert (x["measured"]["tokens"], x["measured"]["tokens_equal"]) == (3, 3)
    assert {m["axes"] for m in x["moved"]} == {"ep"}
    assert "3 of 3" in render(found)


def test_what_is_too_much_for_here_is_not_run() -> None:
    [x] = compare(str(BASE), ["ep4"], batch=2**12, context=64)["layouts"]
    assert x["measured"] is None
    assert "give a smaller --batch or --context" in x["notes"][-1]


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


def test_the_tables_have_every_layout_and_fit_the_terminal(r1: dict[str, Any]) -> None:
    others = [r1["layouts"][1] | {"name": f"other{i}"} for i in range(7)]
    text = render(r1 | {"layouts": r1["layouts"] + others})
    assert max(map(len, text.splitlines())) <= 100
    assert text.count("  experts ") > 1  # columns go on below
    assert {x["name"] for x in others} <= set(text.split())
    assert re.search(r"ep across nodes +19\.10 +4\.760", text)


@pytest.fixture
def named(r1: dict[str, Any]) -> dict[str, Any]:
    """With names that no file, page or formula should take as they are."""
    found = copy.deepcopy(r1)
    found["layouts"][1]["name"] = "<b>&$x^2$/.."
    found["layouts"][1]["moved"][0]["axes"] = "a<b"
    return found


class Page(HTMLParser):
    def __init__(self, text: str):
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))


def test_the_page_is_one_file_whose_parts_find_each_other(named: dict[str, Any]) -> None:
    text = page(named)
    tags = Page(text).tags
    ids = [attrs["id"] for _, attrs in tags if "id" in attrs]
    assert len(ids) == len(set(ids))
    links = [value for _, attrs in tags for name, value in attrs.items() if name.endswith(("href", "src"))]
    assert all(link.startswith(("#", "data:image/png;base64,")) for link in links)
    used = {link[1:] for link in links if link[0] == "#"} | set(re.findall(r"url\(#([^)]*)\)", text))
    assert used <= set(ids)
    assert not {"script", "link", "b/"} & {tag for tag, _ in tags}
    assert sum(tag == "svg" for tag, _ in tags) == 3 + len(named["layouts"])
    assert "&lt;b&gt;&amp;$x^2$/.." in text
    assert "#010203" not in text  # all ink is the page's
    assert "http" not in text


def test_plots_draw_the_document(r1: dict[str, Any]) -> None:
    drawn = plots(r1)
    for name, part in (("sent", "wire_bytes"), ("useful", "payload_bytes")):
        [axes] = drawn[name].axes
        expected = [sum(m[part] for m in x["moved"]) / 1e9 for x in r1["layouts"]]
        assert [bar.get_width() for bar in axes.patches] == pytest.approx(expected)
    held = [x["memory"] for x in r1["layouts"]]
    widths = sum(bar.get_width() for bar in drawn["memory"].axes[0].patches)
    assert widths == pytest.approx(sum(sum(parts.values()) for parts in held) / 1e9)
    shown = drawn["traffic-ep320"].axes[0].images[0].get_array()
    assert shown.shape == (48, 48)
    sent = np.array(r1["layouts"][0]["node_traffic"]) / 1e9
    assert shown[:20, :20].tolist() == pytest.approx(sent)
    assert shown[20:].mask.all()


def test_files_are_written_whole_or_not_at_all(
    named: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
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
            to.write(named)
    assert [path.name for path in tmp_path.iterdir()] == ["report.html"]
    assert report.read_text() == "before"
    to.write(named)
    names = {path.name for path in tmp_path.iterdir()}
    assert {"report.html", "sent.png", "sent.svg", "memory.png", "traffic-ep320.svg"} <= names
    assert "traffic-_b___x_2__...png" in names
    assert (tmp_path / "useful.png").read_bytes().startswith(b"\x89PNG")
    assert report.read_text().startswith("<!doctype html>")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"html": "/nowhere/x.html"}, "/nowhere is no directory"),
        ({"html": "/"}, "/ is a directory, expected a file"),
        ({"folder": "/nowhere/plots"}, "/nowhere is no directory"),
    ],
)
def test_places_that_cannot_be_written_are_refused_at_once(given: dict[str, str], message: str) -> None:
    with pytest.raises(CmxError, match=message):
        Destination(**given)


def test_without_matplotlib_it_says_how_to_install_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    with pytest.raises(CmxError, match=re.escape("pip install 'cmx_jax[plots]'")):
        write.Destination(folder=str(tmp_path))
