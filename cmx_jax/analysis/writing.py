"""Writes a comparison to files: checks the paths before anything is computed, leaves no half-written file."""

import contextlib
import os
import re
from pathlib import Path

from cmx_jax.analysis.compare.comparison import Comparison
from cmx_jax.analysis.compare.html import page
from cmx_jax.analysis.compare.plots import plots
from cmx_jax.analysis.plotting import image, need_matplotlib
from cmx_jax.errors import CmxError


class Destination:
    """The files that a comparison is written to: a page, a folder of plots, both or neither.

    Args:
      html: Path of the page.
      folder: Folder for the plots; it is made if its parent exists.

    Raises:
      CmxError: The file or folder cannot be written, or matplotlib is missing.
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

    def write(self, comparison: Comparison) -> None:
        """Writes the page and the plots.

        Raises:
          CmxError: A file cannot be written; its former content is still there.
        """
        files: dict[Path, bytes] = {}
        if self.folder is not None:
            self.folder.mkdir(exist_ok=True)
            for name, figure in plots(comparison).items():
                file = re.sub(r"[^\w.-]", "_", name)
                for kind in ("png", "svg"):
                    files[self.folder / f"{file}.{kind}"] = image(figure, kind)
        if self.html is not None:
            files[self.html] = page(comparison).encode()
        for path, content in files.items():
            write_whole(path, content)


def need_folder(folder: Path) -> None:
    """Raises an error unless files can be written to a folder.

    Raises:
      CmxError: The folder does not exist, or nothing can be written to it.
    """
    if not folder.is_dir():
        raise CmxError(f"{folder} is not a directory: make it first")
    if not os.access(folder, os.W_OK):
        raise CmxError(f"{folder} cannot be written to, expected a directory that can")


def write_whole(path: Path, content: bytes) -> None:
    """Writes a file completely, or leaves its former content.

    Raises:
      CmxError: The file cannot be written.
    """
    part = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        part.write_bytes(content)
        part.replace(path)
    except OSError as error:
        with contextlib.suppress(OSError):
            part.unlink()
        raise CmxError(f"{path} cannot be written: {error.strerror}") from None
