"""Opens the files of a checkpoint, and nothing else that may lie in its folder."""

from __future__ import annotations

import contextlib
import errno
import os
import stat
from pathlib import Path

O_DIRECT = getattr(os, "O_DIRECT", 0)
_NOFOLLOW = getattr(os, "O_NOFOLLOW", 0)
# Or opening a FIFO hangs.
_NONBLOCK = getattr(os, "O_NONBLOCK", 0)


class RefusedFileError(OSError):
    """A file is of a kind that is not read. Says why; the error made of it names the file."""

    def __str__(self) -> str:
        return self.strerror or ""


class FileChangedError(OSError):
    """A file is not the one any more that was opened under its name first."""

    def __init__(self, name: str) -> None:
        super().__init__(errno.ESTALE, "the file was replaced meanwhile", name)


def identity(status: os.stat_result) -> tuple[int, ...]:
    """Return what changes when a file is written to, or another one takes its name."""
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns


def status_of(path: Path) -> os.stat_result | None:
    """Return what a file is; `None` if there is none."""
    try:
        return path.stat()
    except (FileNotFoundError, NotADirectoryError):
        return None


def open_regular(path: Path, flags: int, *, follow: bool) -> tuple[int, os.stat_result]:
    """Open a file, but no FIFO, socket, device or folder, which would block or never end.

    Args:
        path: The file; the folder that holds it is trusted.
        flags: For `os.open`.
        follow: Whether a symbolic link may lead out of that folder.

    Returns:
        The descriptor, and what the file was then.

    Raises:
        OSError: If it is something else, or is not there.
    """
    link, is_link = path, not follow and stat.S_ISLNK(path.lstat().st_mode)
    if is_link:
        path = _within(link)
    _check_regular(path, path.stat())  # there are devices that act on being opened
    fd = _open(path, flags | (0 if follow else _NOFOLLOW))
    try:
        status = os.fstat(fd)
        _check_regular(path, status)  # it may have been replaced meanwhile
        if is_link:
            _check_place(fd, link)
    except BaseException:
        os.close(fd)
        raise
    return fd, status


def _check_regular(path: Path, status: os.stat_result) -> None:
    if not stat.S_ISREG(status.st_mode):
        problem = "is not a regular file; a checkpoint consists of nothing else: copy it again"
        raise RefusedFileError(errno.EINVAL, problem, str(path))


def _open(path: Path, flags: int) -> int:
    flags |= _NONBLOCK | getattr(os, "O_CLOEXEC", 0)
    try:
        return os.open(path, flags)
    except BlockingIOError:  # another process has a lease on it, and is told to give it back
        return os.open(path, flags & ~_NONBLOCK)
    except OSError as error:
        if error.errno != errno.EINVAL or not flags & O_DIRECT:
            raise
        return os.open(path, flags & ~O_DIRECT)  # a file system in memory, or an odd one


def _within(link: Path) -> Path:
    """Return what a symbolic link leads to, if that is in the same folder.

    Raises:
        OSError: If it leads elsewhere, or nowhere.
    """
    _check_within(os.path.realpath(link), link)  # before it says whether it is there
    try:
        return Path(os.path.realpath(link, strict=True))
    except FileNotFoundError as error:
        problem = f"is a symbolic link to {os.readlink(link)}, which is not there"  # noqa: PTH115
        raise FileNotFoundError(errno.ENOENT, problem, str(link)) from error


def _check_place(fd: int, link: Path) -> None:
    """Make sure that what was opened by way of a link lies where that was looked up.

    A folder on the way may have been exchanged for a link meanwhile.
    """
    with contextlib.suppress(FileNotFoundError, NotADirectoryError):  # no /proc
        _check_within(os.readlink(f"/proc/self/fd/{fd}"), link)  # noqa: PTH115  # no Path is needed


def _check_within(target: str, link: Path) -> None:
    folder = os.path.realpath(link.parent, strict=True)
    if os.path.commonpath([target, folder]) != folder:
        problem = (
            f"is a symbolic link to {target}, outside of the checkpoint's folder. Hugging Face's "
            "cache is made of such links; if you trust the source of this one: "
            "follow_symlinks=True, or --follow-symlinks"
        )
        raise RefusedFileError(errno.ELOOP, problem, str(link))
