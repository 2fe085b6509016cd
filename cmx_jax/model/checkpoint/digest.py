"""A name for a model's weights that changes when they do, without reading all of them."""

import hashlib
from pathlib import Path

from cmx_jax.errors import CmxError

SAMPLE = 1 << 20  # bytes


def digest(directory: Path) -> str:
    """sha256 over the names and sizes of a checkpoint's files, small files as a whole, and of large ones the
    first, a middle and the last MiB: headers of safetensors, and numbers of many tensors.

    Raises:
      CmxError: a file cannot be read.
    """
    found = hashlib.sha256()
    try:
        for path in sorted(p for p in directory.rglob("*") if p.is_file()):
            size = path.stat().st_size
            found.update(f"{path.relative_to(directory).as_posix()}\0{size}\0".encode())
            with path.open("rb") as file:
                if size <= 3 * SAMPLE:
                    found.update(file.read())
                    continue
                for at in (0, size // 2, size - SAMPLE):
                    file.seek(at)
                    found.update(file.read(SAMPLE))
    except OSError as error:
        raise CmxError(f"{error.filename}: cannot be read ({error.strerror})") from None
    return found.hexdigest()
