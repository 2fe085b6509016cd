"""Model caching (section 4.4.3): a checkpoint directory as blocks of the pool.

A block's key is the hash of its bytes. A model's id is the hash of its manifest, which lists the keys of each
file. So another version has another id, and versions share the blocks that they have in common.
"""

import hashlib
import json
import shutil
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from cmx_jax.errors import CmxError
from cmx_jax.serving.ems.pool import Pool

BLOCK_BYTES = 4 << 20

Files = dict[str, list[str]]  # hexadecimal keys of each file's blocks, by its path below the directory
Piece = tuple[str, bytes, str]  # file, its next bytes, and the tier or `source` that held them


@dataclass(frozen=True)
class Loaded:
    """Measurements of a model's loading.

    Attributes:
      seconds: Total time in seconds.
      nbytes: Number of bytes by origin: a tier of the pool (warm), or `source` (cold).
    """

    seconds: float
    nbytes: dict[str, int]


def store_model(pool: Pool, directory: Path, namespace: str) -> str:
    """Stores all files of a directory in the pool. Returns the model's id, 64 hexadecimal digits.

    Raises:
      CmxError: There are no files, they cannot be read, or the pool does not keep all blocks.
    """
    files: Files = {}
    for _ in _from_source(pool, directory, namespace, files):
        pass
    model = _put(pool, namespace, _manifest(files))
    keys = [model, *(key for blocks in files.values() for key in blocks)]
    kept = sum(pool.exists(namespace, bytes.fromhex(key)) for key in keys)
    if kept < len(keys):
        raise CmxError(f"{directory}: the pool keeps {kept} of its {len(keys)} blocks, it needs more bytes")
    return model


def load_model(pool: Pool, model: str, directory: Path, namespace: str, source: Path | None = None) -> Loaded:
    """Writes a stored model to a directory, bit for bit, or nothing at all.

    Args:
      pool: Pool that stores the model.
      model: Id of the model.
      directory: Directory to write, empty or new.
      namespace: Namespace of the pool.
      source: Directory from which to read blocks that the pool no longer has; they are stored in the pool
        again.

    Raises:
      CmxError: The directory is not empty or cannot be written, a block is missing, or the source is another
        version.
    """
    start, nbytes = time.perf_counter(), Counter[str]()
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise CmxError(f"{directory}: is there already, expected an empty or new directory")
    unfinished = directory.with_name(f"{directory.name}.unfinished")
    try:
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir(parents=True)
        for name, data, origin in _pieces(pool, model, namespace, source):
            path = unfinished / name
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("ab") as file:
                file.write(data)
            nbytes[origin] += len(data)
        unfinished.rename(directory)
    except OSError as error:
        raise CmxError(f"{directory}: the model cannot be written ({error})") from None
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return Loaded(time.perf_counter() - start, dict(nbytes))


def _pieces(pool: Pool, model: str, namespace: str, source: Path | None) -> Iterator[Piece]:
    """Yields all bytes of a model, file by file."""
    manifest = _fetch(pool, namespace, model)
    if manifest:
        yield from _from_pool(pool, namespace, _read_manifest(model, manifest[0]), source)
    elif source is None:
        raise CmxError(f"model {model[:80]} is not in the pool, and no source of it was given")
    else:
        files: Files = {}
        yield from _from_source(pool, source, namespace, files)
        stored = _put(pool, namespace, _manifest(files))
        if stored != model:
            raise CmxError(f"{source}: holds model {stored}, expected {model[:80]}")


def _from_pool(pool: Pool, namespace: str, files: Files, source: Path | None) -> Iterator[Piece]:
    for name, keys in files.items():
        for i, key in enumerate(keys):
            piece = _fetch(pool, namespace, key)
            if piece:
                yield name, *piece
            elif source is None:
                raise CmxError(f"block {i} of {name} is not in the pool, and no source of it was given")
            else:
                data = _block(source / name, i)
                if _put(pool, namespace, data) != key:
                    raise CmxError(f"{source / name}: block {i} is not that of the model: another version?")
                yield name, data, "source"


def _from_source(pool: Pool, source: Path, namespace: str, files: Files) -> Iterator[Piece]:
    """Yields all files of a directory; stores their blocks in the pool and adds their keys to `files`."""
    paths = sorted(path for path in source.rglob("*") if path.is_file())
    if not paths:
        raise CmxError(f"{source}: no files there, expected a model's directory")
    for path in paths:
        name = path.relative_to(source).as_posix()
        keys = files.setdefault(name, [])
        while len(keys) * BLOCK_BYTES < path.stat().st_size or not keys:
            data = _block(path, len(keys))
            keys.append(_put(pool, namespace, data))
            yield name, data, "source"


def _block(path: Path, i: int) -> bytes:
    try:
        with path.open("rb") as file:
            file.seek(i * BLOCK_BYTES)
            return file.read(BLOCK_BYTES)
    except OSError as error:
        raise CmxError(f"{path}: cannot be read ({error.strerror})") from None


def _put(pool: Pool, namespace: str, data: bytes) -> str:
    key = hashlib.sha256(data)
    pool.put(namespace, key.digest(), data)
    return key.hexdigest()


def _fetch(pool: Pool, namespace: str, key: str) -> tuple[bytes, str] | None:
    """Returns the bytes with this hash, and their tier, or None."""
    try:
        hit = pool.fetch(namespace, bytes.fromhex(key))
    except ValueError:
        raise CmxError(f"model {key[:80]!r}, expected 64 hex digits") from None
    return hit if hit and hashlib.sha256(hit.payload).hexdigest() == key else None


def _manifest(files: Files) -> bytes:
    return json.dumps({"files": files}, sort_keys=True).encode()


def _read_manifest(model: str, data: bytes) -> Files:
    try:
        files: Files = dict(json.loads(data)["files"])
        names = [PurePosixPath(name) for name in files]
    except (ValueError, KeyError, TypeError):
        raise CmxError(f"block {model} is not a model's manifest") from None
    if any(name.is_absolute() or ".." in name.parts for name in names):
        raise CmxError(f"model {model}: has files outside its directory")
    return files
