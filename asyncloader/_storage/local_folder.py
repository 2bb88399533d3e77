"""A folder of the file system."""

from __future__ import annotations

import contextlib
import errno
import os
import stat
import sys
import threading
from pathlib import Path
from typing import TYPE_CHECKING

from .folder import Entry
from .open_files import OpenFiles, naming
from .opening import identity, open_regular, status_of
from .protocol import views_after
from .small_files import read_file

if sys.platform != "win32":
    import fcntl

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from concurrent.futures import Executor


_CLOEXEC = getattr(os, "O_CLOEXEC", 0)


class _LocalFile:
    """A file whose descriptor may be closed between two calls, where there are too few of them."""

    def __init__(self, path: Path, open_files: OpenFiles) -> None:
        self._path = path
        self._open_files = open_files
        self._open_files.begin(path)

    def write(self, offset: int, views: Sequence[memoryview], /) -> None:
        left = list(views)
        with naming(self._path), self._open_files.using(self._path) as fd:
            while left:
                count = _pwritev(fd, left, offset)
                offset += count
                left = views_after(left, count)

    def sync(self) -> None:
        with naming(self._path), self._open_files.using(self._path) as fd:
            os.fsync(fd)

    def abandon(self) -> None:
        """Do nothing: no write waits for another."""

    def close(self) -> None:
        with naming(self._path):
            self._open_files.close(self._path)


class LocalFolder:
    """A folder of the file system, which need not be there yet."""

    shows_whole = False
    dates_folders = True
    writes_in_order = False

    def __init__(self, root: str | os.PathLike[str]) -> None:
        self._root = Path(root)
        self._open_files = OpenFiles()

    def __repr__(self) -> str:
        return f"<LocalFolder {self.location!r}>"

    @property
    def location(self) -> str:
        """The path."""
        return str(self._root)

    def above(self) -> LocalFolder:
        """Return the folder that this one is in."""
        return LocalFolder(self._root.parent)

    def inside(self, name: str, /) -> LocalFolder:
        """Return a folder in this one."""
        return LocalFolder(self._root / name)

    def resolved(self) -> LocalFolder:
        """Return it by its real path."""
        path = self._root
        return LocalFolder(path.resolve() if path.is_dir() else path.parent.resolve() / path.name)

    def stat(self, name: str, /) -> Entry | None:
        """Say what a name stands for."""
        status = status_of(self._root / name)
        return None if status is None else _entry(status)

    def files(self, name: str, /) -> dict[str, Entry]:
        """Return the files in a folder by name."""
        found = {}
        with os.scandir(self._root / name) as entries:
            for one in entries:
                with contextlib.suppress(OSError):  # removed meanwhile
                    entry = _entry(one.stat())
                    if entry.size is not None:
                        found[one.name] = entry
        return found

    def folders(self, name: str, /) -> list[str]:
        """Return the names of the folders in a folder."""
        with os.scandir(self._root / name) as entries:
            return [one.name for one in entries if os.path.isdir(one)]  # noqa: PTH112  # odd links

    def total(self, name: str, /) -> int:
        """Return the bytes of all files beneath a folder; those of links are not counted."""
        return sum(
            status.st_size
            for root, _, files in os.walk(self._root / name)
            for file in files
            if (status := _own_status(Path(root, file))) is not None
        )

    def make(self, name: str, /) -> None:
        """Make a folder, and let each new name outlive a loss of power."""
        path = self._root / name
        missing = []
        while not path.is_dir():
            missing.append(path)
            path = path.parent
        for new in reversed(missing):
            new.mkdir(exist_ok=True)  # another rank may be faster
            _sync(new.parent)

    def names(self, name: str, /) -> list[str]:
        """Return what a folder holds."""
        with os.scandir(self._root / name) as entries:
            return sorted(
                f"{entry.name}/" if entry.is_dir(follow_symlinks=False) else entry.name
                for entry in entries
            )

    def create(self, name: str, /, *, size: int = 0) -> _LocalFile:  # noqa: ARG002  # of stores
        """Begin a file anew."""
        return _LocalFile(self._root / name, self._open_files)

    def read(self, name: str, /, *, first: int | None = None, last: int | None = None) -> bytes:
        """Return a whole file, or at most so many of its first or last bytes."""
        # No FIFO: it would hang.
        fd, status = open_regular(self._root / name, os.O_RDONLY, follow=True)
        with open(fd, "rb") as file:  # noqa: PTH123  # a descriptor
            if last is not None:
                file.seek(max(status.st_size - last, 0))
            return file.read(first)

    async def aread(self, name: str, executor: Executor, /, *, last: int = -1) -> bytes:
        """Return a file, or its end."""
        return await read_file(self._root / name, executor, last=last)

    def size(self, name: str, /) -> int:
        """Return the length of a file in bytes."""
        return (self._root / name).stat().st_size

    def changed_at(self, name: str, /) -> float:
        """Return when a folder, or a file in it, was last changed."""
        path = self._root / name
        with os.scandir(path) as entries:
            times = [entry.stat(follow_symlinks=False).st_mtime for entry in entries]
        return max(path.stat().st_mtime, *times) if times else path.stat().st_mtime

    def move(self, source: str, target: str, /) -> None:
        """Rename a file."""
        (self._root / source).replace(self._root / target)

    def remove(self, name: str, /) -> None:
        """Remove a file."""
        (self._root / name).unlink()

    def remove_folder(self, name: str, /) -> None:
        """Remove an empty folder."""
        (self._root / name).rmdir()

    def sync(self, name: str, /) -> None:
        """Sync a folder."""
        _sync(self._root / name)

    @contextlib.contextmanager
    def hold(self) -> Iterator[bool]:
        """Lock the folder, where the system can; the lock ends with the process at the latest."""
        if sys.platform == "win32":  # no folder can be opened there
            yield True
            return
        fd = os.open(self._root, os.O_RDONLY | _CLOEXEC)
        try:
            yield _locked(fd)
        finally:
            with contextlib.suppress(OSError):
                # Closing would not do: a process that was forked meanwhile holds the lock too.
                fcntl.flock(fd, fcntl.LOCK_UN)
            os.close(fd)


def _own_status(path: Path) -> os.stat_result | None:
    with contextlib.suppress(OSError):  # removed meanwhile
        return path.lstat()
    return None


def _entry(status: os.stat_result) -> Entry:
    size = status.st_size if stat.S_ISREG(status.st_mode) else None
    return Entry(size, identity(status), status.st_mtime)


def _locked(fd: int) -> bool:
    if sys.platform == "win32":
        return True
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        # Some network file systems lock no folders; others refuse while another process holds it.
        return error.errno not in {errno.EWOULDBLOCK, errno.EACCES, errno.EAGAIN}
    return True


def _sync(path: Path) -> None:
    if sys.platform == "win32":  # no folder can be opened there
        return
    with naming(path):
        fd = os.open(path, os.O_RDONLY | _CLOEXEC)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)


if hasattr(os, "pwritev"):

    def _pwritev(fd: int, views: Sequence[memoryview], offset: int) -> int:
        return os.pwritev(fd, views, offset)

else:  # Windows: one position a descriptor, so one writer at a time
    _seek_and_write = threading.Lock()

    def _pwritev(fd: int, views: Sequence[memoryview], offset: int) -> int:
        with _seek_and_write:
            os.lseek(fd, offset, os.SEEK_SET)
            return os.write(fd, views[0])
