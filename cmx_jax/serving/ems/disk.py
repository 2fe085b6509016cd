"""The disk tier: one file for each block; only this tier survives a restart (section 4.4.1).

A block is written under another name and renamed when it is complete, so a process that dies while writing
leaves a `.tmp` file, which the next process removes, and never half a block. Files are not synced one by one:
a power failure may lose the newest blocks, and the checksum reveals torn ones when they are read.
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
    """Files `namespace/first two digits/key` below a folder that one process uses at a time.

    Methods that use `lru` need the caller's lock; `read` and `stage`, which take most of the time, do not.

    Attributes:
      folder: Folder of the blocks.
      lru: Sizes of the blocks, in the order of their last use.
      error: Last error of the file system, or "".

    Raises:
      CmxError: The folder cannot be made, or another process uses it.
    """

    def __init__(self, folder: Path, capacity: int, low: float, high: float):
        self.folder, self.lru = folder, Lru(capacity, low, high)
        self.error = ""
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
            reason = "another cache server has this folder, choose another one" if taken else error.strerror
            raise CmxError(f"{folder}: {reason}") from None
        self._recover()

    @property
    def identity(self) -> str:
        """Device and inode of the folder, which identify it on this machine."""
        status = os.fstat(self._lock)
        return f"{status.st_dev:x}_{status.st_ino:x}"

    def path(self, name: Name) -> Path:
        """Returns the path of a block's file."""
        digits = name[1].hex()
        return self.folder / name[0] / digits[:2] / digits

    def read(self, name: Name) -> bytes | None:
        """Returns a block without verifying it: b"" if there is no file, None if it cannot be read now."""
        try:
            return self.path(name).read_bytes()
        except FileNotFoundError:
            return b""
        except OSError as error:
            self.error = str(error)
            return None

    def stage(self, name: Name, block: bytes) -> Path | None:
        """Writes a block to a temporary file. Returns its path, or None if the disk is full or fails."""
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
                _remove(staged)
            return None

    def publish(self, name: Name, staged: Path, size: int) -> bool:
        """Renames a staged block to its final path. Returns whether that succeeded."""
        try:
            staged.replace(self.path(name))
        except OSError as error:
            self.error = str(error)
            _remove(staged)
            return False
        _stamp(self.path(name))
        self.lru.add(name, size)
        return True

    def discard(self, staged: Path) -> None:
        """Removes a staged block that is not needed."""
        _remove(staged)

    def touch(self, name: Name) -> None:
        """Marks a block as the most recently used one, also for the time after a restart."""
        self.lru.touch(name)
        _stamp(self.path(name))

    def drop(self, name: Name) -> None:
        """Removes a block."""
        self.lru.drop(name)
        _remove(self.path(name))

    def close(self) -> None:
        """Forgets all blocks and unlocks the folder; the files stay."""
        self.lru.clear()
        os.close(self._lock)

    def _recover(self) -> None:
        """Lists the blocks of earlier processes; a block is verified when it is read."""
        blocks = []
        for path in self.folder.glob("*/??/*"):
            digits, prefix, namespace = path.name, path.parent.name, path.parent.parent.name
            if path.suffix == ".tmp":
                _remove(path)
            elif _FILE.fullmatch(digits) and digits[:2] == prefix and NAMESPACE.fullmatch(namespace):
                status = path.lstat()
                blocks.append((status.st_mtime_ns, (namespace, bytes.fromhex(digits)), status.st_size))
        for _, name, size in sorted(blocks):
            self.lru.add(name, size)
        for victim in self.lru.crowded(0):
            self.drop(victim)


def _stamp(path: Path) -> None:
    """Sets a file's times to now.

    They are finer than a file system's clock, so that the order of use survives a restart.
    """
    now = time.time_ns()
    with contextlib.suppress(OSError):
        os.utime(path, ns=(now, now))


def _remove(path: Path) -> None:
    with contextlib.suppress(OSError):
        path.unlink()
