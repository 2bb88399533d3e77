"""Watches what a load does besides loading: files it opens, what it leaves behind, its memory."""

from __future__ import annotations

import contextlib
import os
import sys
import threading
from pathlib import Path
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["Watch", "watched"]

MOST = 64 << 20
"""What a load may take besides its destination and its budget, in bytes."""

# Where Python, its packages, and what the kernel says of processes are.
_SYSTEM = (
    "/proc/",
    "/sys/",
    "/dev/",
    sys.prefix,
    sys.base_prefix,
    str(Path(torch.__file__).parents[1]),
)


class Watch:
    """Sees every file that the process opens, once it is installed; hooks cannot be taken out."""

    def __init__(self) -> None:
        self.opened: list[str] | None = None
        sys.addaudithook(self._see)

    def _see(self, event: str, arguments: tuple[object, ...]) -> None:
        if event == "open" and self.opened is not None:
            path = arguments[0]
            if isinstance(path, str | bytes):
                self.opened.append(os.fsdecode(path))

    @contextlib.contextmanager
    def within(self, folder: Path, *, most: int = MOST) -> Iterator[None]:
        """Check that nothing outside of a folder is opened, nothing left behind, no more taken."""
        threads, files = set(threading.enumerate()), _open_files()
        self.opened = []
        before = _reset_peak()
        try:
            yield
        finally:
            opened, self.opened = self.opened, None
            peak = _memory("VmHWM")
        strange = [path for path in opened if not _is_inside(path, folder)]
        assert not strange, f"opened {strange}"
        assert set(threading.enumerate()) <= threads, "a thread was left behind"
        assert _open_files() == files, "a file was left open"
        assert peak - before < most, f"took {peak - before} bytes"


def watched() -> Watch:
    """Return the one watch of this process."""
    global _watch  # noqa: PLW0603
    if _watch is None:
        _watch = Watch()
    return _watch


_watch: Watch | None = None


def _is_inside(path: str, folder: Path) -> bool:
    where = os.path.normpath(path)
    return where.startswith((str(folder) + os.sep, *_SYSTEM)) or where == str(folder)


def _open_files() -> int:
    return len(os.listdir("/proc/self/fd"))  # noqa: PTH208  # as fast as it gets


def _reset_peak() -> int:
    """Have the kernel forget the peak; return what is in memory now."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
    return _memory("VmRSS")


def _memory(what: str) -> int:
    with Path("/proc/self/status").open() as lines:
        return next(int(line.split()[1]) << 10 for line in lines if line.startswith(what))
