"""A copy of an object on the local disk: a sparse file, and a record of what it holds."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import orjson

from .extents import Extents

if TYPE_CHECKING:
    from collections.abc import Sequence


DATA, RECORD = ".bytes", ".json"
_BOOT = Path("/proc/sys/kernel/random/boot_id")


class Copy:
    """A copy that is open. Its cache's locks keep threads and processes apart.

    Args:
        path: Of the file.
        url: Of the object, for people who look into a record.
        fd: Of the file.

    Attributes:
        extents: What it holds.
        users: Threads that are at it.
        was_here: Whether it held something when it was opened.
        is_new: Whether it holds more than its record says.
    """

    def __init__(self, path: Path, url: str, fd: int) -> None:
        self.path = path
        self.url = url
        self.fd = fd
        self.extents = Extents()
        self.users = 0
        self.is_new = False
        self.was_here = False
        self._is_left = False

    def leave(self) -> None:
        """Close it once no thread uses it."""
        self._is_left = True
        self.end()

    def end(self) -> None:
        """Close it if it is left, and no thread uses it."""
        if self._is_left and not self.users:
            os.close(self.fd)

    def take_record(self) -> None:
        """Hold what others have recorded, too."""
        if self._is_named() and (ranges := self._recorded()):
            self.extents.add_all(ranges)
            self.was_here = True
            os.utime(self.path.with_suffix(RECORD))

    def record(self) -> None:
        """Write down what it holds, and that it was used; not if its file was removed meanwhile."""
        if not self._is_named():
            return
        path = self.path.with_suffix(RECORD)
        if not self.is_new:
            with contextlib.suppress(FileNotFoundError):
                os.utime(path)
            return
        self.extents.add_all(self._recorded())
        boot = _boot()
        if boot is None:  # nobody will know whether the bytes came to the disk
            os.fsync(self.fd)
        record = {"url": self.url, "boot": boot, "ranges": self.extents.pairs()}
        beside = path.with_suffix(".new")
        beside.write_bytes(orjson.dumps(record))
        beside.replace(path)
        self.is_new = False

    def _is_named(self) -> bool:
        """Say whether its name still is that of the file that is open."""
        with contextlib.suppress(FileNotFoundError):
            return os.path.samestat(self.path.stat(), os.fstat(self.fd))
        return False

    def _recorded(self) -> Sequence[tuple[int, int]]:
        try:
            text = self.path.with_suffix(RECORD).read_bytes()
            record: dict[str, Any] = orjson.loads(text)
            ranges = [(int(begin), int(end)) for begin, end in record["ranges"]]
            boot = record["boot"]
        except (FileNotFoundError, ValueError, TypeError, KeyError):
            return ()
        is_whole = os.fstat(self.fd).st_size >= max((end for _, end in ranges), default=0)
        return ranges if is_whole and boot in {None, _boot()} else ()


def last_use(path: Path) -> float:
    """Return when a copy was last used, in seconds of the system's clock."""
    record = path.with_suffix(RECORD)
    return (record if record.exists() else path).stat().st_mtime


def _boot() -> str | None:
    """Return what is another text after each start of the machine; `None` if it has no such."""
    with contextlib.suppress(OSError):
        return _BOOT.read_text().strip()
    return None
