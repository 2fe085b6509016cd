"""The lower tier: one file for each block, and all that survives a restart (section 4.4.1).

A block is written under another name and renamed when it is whole, so a process that dies in the middle
leaves a `.tmp` file, which the next one removes, and never half a block. Files are not synced one by one: a
power failure may cost the newest blocks, and of those that it tore the checksum tells, when they are read.
"""

import contextlib
import fcntl
import os
import re
import tempfile
import time
from pathlib import Path

from cmx_jax.errors import CmxError
from cmx_jax.serving.ems.lru import Lru
from cmx_jax.serving.ems.store import NAMESPACE, Name

_FILE = re.compile("[0-9a-f]{64}")


class Disk:
    """Files `namespace/first two digits/key` below a folder that one process has at a time.

    Methods that look at `lru` need the caller's lock; `read` and `stage` do not, and take the time.

    Raises:
      CmxError: the folder cannot be made, or another process has it.
    """

    def __init__(self, folder: Path, capacity: int, low: float, high: float):
        self.folder, self.lru = folder, Lru(capacity, low, high)
        self.error = ""  # the last one
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._lock = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        except OSError as error:
            raise CmxError(f"{folder}: no folder for blocks ({error.strerror})") from None
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            os.close(self._lock)
            taken = isinstance(error, BlockingIOError)
            why = "another cache server has this folder, choose another one" if taken else error.strerror
            raise CmxError(f"{folder}: {why}") from None
        self._recover()

    @property
    def identity(self) -> str:
        """What tells this folder from all others of the machine."""
        status = os.fstat(self._lock)
        return f"{status.st_dev:x}_{status.st_ino:x}"

    def path(self, name: Name) -> Path:
        """Where a block lies."""
        digits = name[1].hex()
        return self.folder / name[0] / digits[:2] / digits

    def read(self, name: Name) -> bytes | None:
        """A block as it lies there, None if it cannot be read now; nothing is verified."""
        try:
            return self.path(name).read_bytes()
        except FileNotFoundError:
            return b""
        except OSError as error:
            self.error = str(error)
            return None

    def stage(self, name: Name, block: bytes) -> Path | None:
        """The file that a block was written to, None if the disk takes no more."""
        folder, staged = self.path(name).parent, None
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            with tempfile.NamedTemporaryFile(dir=folder, suffix=".tmp", delete=False) as file:
                staged = Path(file.name)
                file.write(block)
            return staged
        except OSError as error:
            self.error = str(error)
            if staged:
                _removed(staged)
            return None

    def publish(self, name: Name, staged: Path, size: int) -> bool:
        """Puts a staged block in its place; whether that went well."""
        try:
            staged.replace(self.path(name))
        except OSError as error:
            self.error = str(error)
            _removed(staged)
            return False
        _stamped(self.path(name))
        self.lru.add(name, size)
        return True

    def discard(self, staged: Path) -> None:
        """Removes a staged block that is not wanted."""
        _removed(staged)

    def touch(self, name: Name) -> None:
        """Makes a block the newest, after a restart too."""
        self.lru.touch(name)
        _stamped(self.path(name))

    def drop(self, name: Name) -> None:
        """Removes a block."""
        self.lru.drop(name)
        _removed(self.path(name))

    def close(self) -> None:
        """Forgets all blocks and leaves the folder to others."""
        self.lru.clear()
        os.close(self._lock)

    def _recover(self) -> None:
        """Finds what is there; a block is verified when it is read."""
        found = []
        for path in self.folder.glob("*/??/*"):
            digits, prefix, namespace = path.name, path.parent.name, path.parent.parent.name
            if path.suffix == ".tmp":
                _removed(path)
            elif _FILE.fullmatch(digits) and digits[:2] == prefix and NAMESPACE.fullmatch(namespace):
                status = path.lstat()
                found.append((status.st_mtime_ns, (namespace, bytes.fromhex(digits)), status.st_size))
        for _, name, size in sorted(found):
            self.lru.add(name, size)
        for victim in self.lru.crowded(0):
            self.drop(victim)


def _stamped(path: Path) -> None:
    """Notes when a block was used: finer than a file system's clock, so that the order survives."""
    now = time.time_ns()
    with contextlib.suppress(OSError):
        os.utime(path, ns=(now, now))


def _removed(path: Path) -> None:
    with contextlib.suppress(OSError):
        path.unlink()
