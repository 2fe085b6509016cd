"""The look that all figures share. Matplotlib is an optional extra, imported only when a figure is drawn.

Colours are Okabe and Ito's, which people who see red and green alike can tell apart.
"""

import importlib.util
import io
from typing import Any

from cmx_jax.errors import CmxError

COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#F0E442", "#999999")
STYLE: dict[Any, Any] = {
    "font.size": 10,
    "svg.fonttype": "none",
    "axes.facecolor": "none",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "text.parse_math": False,
}


def need_matplotlib() -> None:
    """Raises an error unless matplotlib is installed.

    Raises:
      CmxError: Matplotlib is missing.
    """
    if importlib.util.find_spec("matplotlib") is None:
        raise CmxError("plots need matplotlib: pip install 'cmx_jax[plots]'")


def image(figure: Any, kind: str, paper: str = "white") -> bytes:
    """Returns a figure as `svg` or `png`; the same figure always gives the same bytes.

    Args:
      figure: Figure of matplotlib.
      kind: Format, `svg` or `png`.
      paper: Colour of the background, or `none`.
    """
    import matplotlib

    out = io.BytesIO()
    with matplotlib.rc_context(STYLE | {"svg.hashsalt": figure.get_label()}):
        metadata = {"Date": None} if kind == "svg" else {"Software": None}
        figure.savefig(out, format=kind, facecolor=paper, metadata=metadata, dpi=200)
    return out.getvalue()
