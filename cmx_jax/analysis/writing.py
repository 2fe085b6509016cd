"""Where a comparison is written: looked at before anything is computed, and never left half-written."""

import contextlib
import os
import re
from pathlib import Path
from typing import Any

from cmx_jax.analysis.compare.html import page
from cmx_jax.analysis.compare.plots import plots
from cmx_jax.analysis.plotting import image, need_matplotlib
from cmx_jax.errors import CmxError


class Destination:
    """A page, a folder of plots, both or neither.

    Args:
      html: file of the page.
      folder: of the plots; made if its parent is there.

    Raises:
      CmxError: there cannot be such a file, there is no such folder, or matplotlib is missing.
    """

    def __init__(self, html: str | None = None, folder: str | None = None):
        self.html, self.folder = (None if x is None else Path(x) for x in (html, folder))
        if self.html is not None:
            if self.html.is_dir():
                raise CmxError(f"{self.html} is a directory, expected a file for the report")
            need_folder(self.html.parent)
        if self.folder is not None:
            need_folder(self.folder if self.folder.exists() else self.folder.parent)
        if self.html is not None or self.folder is not None:
            need_matplotlib()

    def write(self, d: dict[str, Any]) -> None:
        """Writes what `compare` gave.

        Raises:
          CmxError: a file cannot be written; what was there before is still there.
        """
        files: dict[Path, bytes] = {}
        if self.folder is not None:
            self.folder.mkdir(exist_ok=True)
            for name, figure in plots(d).items():
                file = re.sub(r"[^\w.-]", "_", name)
                for kind in ("png", "svg"):
                    files[self.folder / f"{file}.{kind}"] = image(figure, kind)
        if self.html is not None:
            files[self.html] = page(d).encode()
        for path, content in files.items():
            write_whole(path, content)


def need_folder(folder: Path) -> None:
    """Raises:
    CmxError: there is no such folder, or nothing can be written to it."""
    if not folder.is_dir():
        raise CmxError(f"{folder} is no directory: make it first")
    if not os.access(folder, os.W_OK):
        raise CmxError(f"{folder} cannot be written to, expected a directory that can")


def write_whole(path: Path, content: bytes) -> None:
    """Writes a file, or leaves what was there before.

    Raises:
      CmxError: it cannot be written.
    """
    part = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        part.write_bytes(content)
        part.replace(path)
    except OSError as error:
        with contextlib.suppress(OSError):
            part.unlink()
        raise CmxError(f"{path} cannot be written: {error.strerror}") from None
