"""Descriptors of files that are being written, for as long as there are enough of them."""

from __future__ import annotations

import contextlib
import errno
import os
import threading
from collections import OrderedDict
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


_CLOEXEC = getattr(os, "O_CLOEXEC", 0)
_TOO_MANY_OPEN = {errno.EMFILE, errno.ENFILE}
# More than one: the rest of the program may want to open files, too.
_CLOSED_AT_ONCE = 8


class OpenFiles:
    """The descriptors of files that are being written.

    All of them stay open. Only when the process may open no more files, idle ones
    are synced and closed, some at a time, and opened again for their next call.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()  # held while files are closed and opened, but for no write
        self._files: OrderedDict[Path, _Descriptor] = OrderedDict()

    def begin(self, path: Path) -> None:
        """Create a file, or empty it."""
        with self._lock:
            self._files[path] = _Descriptor(self._open(path, os.O_CREAT | os.O_TRUNC))

    @contextlib.contextmanager
    def using(self, path: Path) -> Iterator[int]:
        """Lend a file's descriptor, which stays open for the length of the block."""
        with self._lock:
            file = self._files[path]
            self._files.move_to_end(path)
            if file.fd is None:
                file.fd = self._open(path, 0)
            file.users += 1
        try:
            yield file.fd
        finally:
            with self._lock:
                file.users -= 1

    def close(self, path: Path) -> None:
        """Forget a file."""
        with self._lock:
            fd = self._files.pop(path).fd
        if fd is not None:
            os.close(fd)

    def _open(self, path: Path, flags: int) -> int:
        while True:
            try:
                return os.open(path, os.O_WRONLY | flags | _CLOEXEC, 0o666)
            except OSError as error:
                if error.errno not in _TOO_MANY_OPEN or not self._close_idle():
                    raise

    def _close_idle(self) -> bool:
        """Close the files that were not used for longest; say whether there were any."""
        idle = [file for file in self._files.values() if file.fd is not None and not file.users]
        for file in idle[:_CLOSED_AT_ONCE]:
            if file.fd is not None:
                # Or a write that fails later could be forgotten with the descriptor.
                os.fsync(file.fd)
                fd, file.fd = file.fd, None
                os.close(fd)
        return bool(idle)


@dataclass(slots=True)
class _Descriptor:
    fd: int | None
    users: int = 0


@contextlib.contextmanager
def naming(path: Path) -> Iterator[None]:
    """Have errors say which file they are about: calls that take a descriptor leave that out."""
    try:
        yield
    except OSError as error:
        if error.filename is None:
            error.filename = str(path)
        raise
