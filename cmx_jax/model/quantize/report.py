"""`quantization.json`: the errors of each matrix, saved after each layer so that a run can be resumed."""

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path

from cmx_jax.errors import CmxError
from cmx_jax.model.checkpoint.manifest import REPORT
from cmx_jax.model.fields import read_json


@dataclass(frozen=True)
class MatrixError:
    """Relative errors of a matrix's products in W8A8; for experts' matrices the mean over experts.

    Attributes:
      plain: Error by rounding alone, of the matrix as it was.
      written: Error of the matrix as it is written.
      clipped: Share of output channels that are clipped.
    """

    plain: float
    written: float
    clipped: float


@dataclass
class Report:
    """Measurements of a quantisation.

    Attributes:
      sensitivity: Cost of rounding a field alone, in nats, by field (`stack/path`).
      layers: Errors by unit and path of the matrix.
    """

    sensitivity: dict[str, float] = field(default_factory=dict)
    layers: dict[str, dict[str, MatrixError]] = field(default_factory=dict)

    def save(self, directory: Path) -> None:
        """Replaces the report of a directory in one step."""
        path = directory / REPORT
        unfinished = path.with_name(path.name + ".unfinished")
        unfinished.write_text(json.dumps(asdict(self), indent=1) + "\n")
        unfinished.rename(path)


def read_report(directory: Path) -> Report | None:
    """Reads the report of a directory; None if there is none.

    Raises:
      CmxError: The report is damaged.
    """
    path = directory / REPORT
    if not path.is_file():
        return None
    raw = read_json(path)
    try:
        layers = {
            unit: {matrix: MatrixError(**errors) for matrix, errors in matrices.items()}
            for unit, matrices in raw["layers"].items()
        }
        return Report(dict(raw["sensitivity"]), layers)
    except (KeyError, TypeError, AttributeError, ValueError):
        raise CmxError(
            f"{path}: not a report of cmx quantize: delete {directory} and run this again"
        ) from None
