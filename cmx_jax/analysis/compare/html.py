"""A comparison as one page: no script, nothing that it loads, readable on a phone, in light and in dark."""

import re
from collections.abc import Iterator
from html import escape
from typing import Any

from cmx_jax.analysis.compare.plots import plots
from cmx_jax.analysis.compare.report import Table, heading, notes, tables, text
from cmx_jax.analysis.plotting import image

INK = "#010203"  # what plots are drawn with, to become the page's own
STYLE = """
:root { color-scheme: light dark; --line: #8885; --paper: #fff; --ink: #222; }
@media (prefers-color-scheme: dark) { :root { --paper: #16181b; --ink: #e6e6e6; } }
body { margin: 0 auto; padding: 1rem; max-width: 60rem; font: 16px/1.5 system-ui, sans-serif;
  color: var(--ink); background: var(--paper); }
h1 { font-size: 1.5rem; line-height: 1.25; } h2 { font-size: 1.1rem; margin: 2rem 0 .5rem; }
.scroll { overflow-x: auto; }
table { border-spacing: 0; font-variant-numeric: tabular-nums; }
th, td { padding: .3rem .5rem; text-align: right; border-bottom: 1px solid var(--line); white-space: nowrap; }
th[scope=row] { text-align: left; font-weight: normal; white-space: normal; min-width: 8rem; padding-left: 0;
  position: sticky; left: 0; background: var(--paper); }
figure { margin: 1rem 0; } figcaption { font-size: .9rem; }
svg { display: block; width: 100%; max-width: 28rem; height: auto; }
svg text { font-family: inherit !important; } svg image { image-rendering: pixelated; }
.maps { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 20rem), 1fr)); gap: 1rem; }
"""
ABOUT_MAPS = (
    "By the groups of each collective; what stays within a node is on the diagonal. "
    "The same colour is as many bytes in all maps, grey is none."
)


def page(d: dict[str, Any]) -> str:
    """The whole page.

    Args:
      d: what `compare` gave.

    Raises:
      CmxError: matplotlib is missing.
    """
    drawn = {name: _inline(i, name, figure) for i, (name, figure) in enumerate(plots(d, INK).items())}
    behind = {"useful bytes": "useful", "bytes that": "sent", "memory of a rank,": "memory"}
    title = f"{d['model']}: layouts compared"
    lines = [
        '<!doctype html><html lang="en"><head><meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<title>{escape(title)}</title><style>{STYLE}</style></head><body>",
        f"<h1>{escape(title)}</h1><p>{escape(heading(d))}.</p><ul>",
        *(f"<li><b>{escape(x['name'])}</b>: {escape(x['about'])}</li>" for x in d["layouts"]),
        "</ul>",
    ]
    for table in tables(d):
        lines += _table(table, [x["name"] for x in d["layouts"]])
        lines += [drawn[name] for begin, name in behind.items() if table.title.startswith(begin)]
    lines += [f"<h2>bytes between nodes</h2><p>{ABOUT_MAPS}</p>"]
    lines += ['<div class="maps">', *(drawn[f"traffic-{x['name']}"] for x in d["layouts"]), "</div>"]
    lines += ["<h2>notes</h2><ul>", *(f"<li>{escape(note)}</li>" for note in notes(d)), "</ul></body></html>"]
    return "\n".join(lines) + "\n"


def _table(table: Table, names: list[str]) -> Iterator[str]:
    yield f'<h2>{escape(table.title)}</h2><div class="scroll"><table><tr><th scope="row"></th>'
    yield "".join(f'<th scope="col">{escape(name)}</th>' for name in names) + "</tr>"
    for label, row in table.rows.items():
        cells = "".join(f"<td>{escape(text(value))}</td>" for value in row)
        yield f'<tr><th scope="row">{escape(label)}</th>{cells}</tr>'
    yield "</table></div>"


def _inline(number: int, name: str, figure: Any) -> str:
    """An SVG as part of a page: as wide as there is room, in its colour, with names of its own."""
    svg = image(figure, "svg", "none").decode()
    svg = svg[svg.index("<svg") :].replace(INK, "currentColor")
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'(id="|href="#|url\(#)', rf"\1p{number}-", svg)
    box = re.search(r'viewBox="[^"]*"', svg)[0]  # type: ignore[index]
    label = escape(figure.get_label(), quote=True)
    svg = re.sub(r"<svg[^>]*>", lambda _: f'<svg {box} role="img" aria-label="{label}">', svg, count=1)
    return f"<figure>{svg}</figure>"
