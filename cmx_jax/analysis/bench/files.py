"""Where a measurement is written: looked at before anything is sent."""

import json
import re
from pathlib import Path
from typing import Any

from cmx_jax.analysis.bench.plot import timeline
from cmx_jax.analysis.plotting import image, need_matplotlib
from cmx_jax.analysis.writing import need_folder, write_whole
from cmx_jax.errors import CmxError

KINDS = (".png", ".svg")


class Files:
    """A JSON document, a picture, both or neither.

    Args:
      save: whether to write the document.
      folder: where; None: the working directory.
      name: None: what was measured, and when, as vLLM names it.
      plot: file of the picture, of one of `KINDS`.

    Raises:
      CmxError: there cannot be such a file, a name is given but nothing is saved, or matplotlib is missing.
    """

    def __init__(self, save: bool, folder: str | None, name: str | None, plot: Path | None):
        if not save and (folder or name):
            flag = "--result-dir" if folder else "--result-filename"
            raise CmxError(f"{flag} is given without --save-result: give both")
        self._save, self._folder, self._name, self._plot = save, Path(folder or "."), name, plot
        if save:
            self._need((self._folder / name if name else self._folder / "result").absolute())
        if plot is not None:
            if plot.suffix not in KINDS:
                raise CmxError(f"--plot-timeline {plot}: expected a file that ends with {' or '.join(KINDS)}")
            self._need(plot.absolute())
            need_matplotlib()

    def _need(self, file: Path) -> None:
        if file.is_dir():
            raise CmxError(f"{file} is a directory, expected a file")
        need_folder(file.parent)

    def write(self, d: dict[str, Any]) -> None:
        """Writes what `summary` gave, with its settings.

        Raises:
          CmxError: a file cannot be written; what was there before is still there.
        """
        if self._save:
            text = json.dumps(d, ensure_ascii=False)
            write_whole(self._folder / (self._name or _named(d)), text.encode(errors="backslashreplace"))
        if self._plot is not None:
            write_whole(self._plot, image(timeline(d), self._plot.suffix[1:]))


def _named(d: dict[str, Any]) -> str:
    rate = "trace" if d["request_rate"] is None else f"{d['request_rate']}qps"
    limit = f"-concurrency{d['max_concurrency']}" if d["max_concurrency"] else ""
    model = re.sub(r"[^\w.-]", "_", d["model_id"])
    return f"{d['backend']}-{rate}{limit}-{model}-{d['date']}.json"
