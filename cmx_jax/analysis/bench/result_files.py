"""Files of a measurement, checked before any request is sent."""

import json
import re
from pathlib import Path

from cmx_jax.analysis.bench.options import Settings
from cmx_jax.analysis.bench.plot import timeline
from cmx_jax.analysis.bench.serving_metrics import BenchmarkSummary
from cmx_jax.analysis.plotting import image, need_matplotlib
from cmx_jax.analysis.writing import need_folder, write_whole
from cmx_jax.errors import CmxError

KINDS = (".png", ".svg")


class OutputFiles:
    """A JSON document, a picture, both or neither.

    Args:
      save: Flag; the document is written.
      folder: Directory of the document; None: the working directory.
      name: File name of the document; None: settings and date, as vLLM names it.
      plot: File of the picture, with an extension from `KINDS`; None: no picture.

    Raises:
      CmxError: A file cannot be created, a name is given without `save`, or matplotlib is missing.
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

    def write(self, settings: Settings, summary: BenchmarkSummary) -> None:
        """Writes the files.

        Raises:
          CmxError: A file cannot be written; its previous content is unchanged.
        """
        if self._save:
            text = json.dumps(settings.as_dict() | summary.as_dict(), ensure_ascii=False)
            name = self._name or _default_name(settings)
            write_whole(self._folder / name, text.encode(errors="backslashreplace"))
        if self._plot is not None:
            write_whole(self._plot, image(timeline(summary), self._plot.suffix[1:]))


def _default_name(s: Settings) -> str:
    rate = "trace" if s.request_rate is None else f"{s.request_rate}qps"
    limit = f"-concurrency{s.max_concurrency}" if s.max_concurrency else ""
    model = re.sub(r"[^\w.-]", "_", s.model_id)
    return f"{s.backend}-{rate}{limit}-{model}-{s.date}.json"
