"""A comparison as one page without scripts or links, readable on a phone, in light and in dark."""

import re
from pathlib import Path
from typing import Any

from jinja2 import Environment
from markupsafe import Markup, escape

from cmx_jax.analysis.compare.comparison import Comparison
from cmx_jax.analysis.compare.comparison_tables import heading, notes, tables, text
from cmx_jax.analysis.compare.plots import plots
from cmx_jax.analysis.plotting import image

INK = "#010203"  # the colour that plots are drawn in, to be replaced by the page's own
TEMPLATE = Path(__file__).with_name("page.html.j2")


def page(comparison: Comparison) -> str:
    """Returns the page as HTML.

    Raises:
      CmxError: matplotlib is missing.
    """
    figures = plots(comparison, INK)
    environment = Environment(autoescape=True, trim_blocks=True, keep_trailing_newline=True)
    environment.filters["text"] = text
    return environment.from_string(TEMPLATE.read_text()).render(
        comparison=comparison,
        heading=heading(comparison),
        tables=tables(comparison),
        figures={name: _inline(i, figure) for i, (name, figure) in enumerate(figures.items())},
        notes=notes(comparison),
    )


def _inline(number: int, figure: Any) -> Markup:
    """Returns a figure as an `<svg>` that fits the page: its width and colour, and ids `p{number}-...`."""
    svg = image(figure, "svg", "none").decode()
    svg = svg[svg.index("<svg") :].replace(INK, "currentColor")
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'(id="|href="#|url\(#)', rf"\1p{number}-", svg)
    box = re.search(r'viewBox="[^"]*"', svg)[0]  # type: ignore[index]
    start = f'<svg {box} role="img" aria-label="{escape(figure.get_label())}">'
    return Markup(re.sub(r"<svg[^>]*>", lambda _: start, svg, count=1))
