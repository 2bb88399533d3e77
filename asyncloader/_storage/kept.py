"""Files that stay open when the load that has opened them is over."""

from __future__ import annotations

import contextlib
import os
import weakref
from typing import TYPE_CHECKING, Final

from .opening import FileChangedError, identity
from .past_cache import open_past_cache

if TYPE_CHECKING:
    from collections.abc import Callable


class KeptFile:
    """A file that is open until nothing refers to this object any more.

    A thread that reads holds it, so that its descriptor never becomes another file's.

    Args:
        location: The checkpoint, for messages.
        name: The file's name in it.
        fd: Its descriptor, which belongs to this object from now on.
        status: What it was when it was opened first.
        identity: What of it stays the same as long as its rows do.
        fstat: Looks at a descriptor.

    Attributes:
        location: The checkpoint, for messages.
        name: The file's name in it.
        fd: Its descriptor.
    """

    def __init__(
        self,
        location: str,
        name: str,
        fd: int,
        status: os.stat_result,
        *,
        identity: Callable[[os.stat_result], tuple[int, ...]] = identity,
        fstat: Callable[[int], os.stat_result] = os.fstat,
    ) -> None:
        self.location: Final = location
        self.name: Final = name
        self.fd: Final = fd
        self._identity = identity
        self._first = identity(status)
        self._fstat = fstat
        self._direct: tuple[int, int] | tuple[()] | None = None
        weakref.finalize(self, _close, fd).atexit = False
        if hasattr(os, "posix_fadvise"):
            with contextlib.suppress(OSError):  # neighbours of a row are not wanted
                os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_RANDOM)

    def __repr__(self) -> str:
        return f"<KeptFile {self.name!r} of {self.location!r}>"

    def check(self) -> None:
        """Make sure that nothing was written to it. What its name leads to by now is no matter.

        Raises:
            FileChangedError: If something was.
        """
        if self._identity(self._fstat(self.fd)) != self._first:
            raise FileChangedError(self.name)

    def past_cache(self) -> tuple[int, int] | None:
        """Open the same file for reads past the page cache, once.

        Returns:
            A descriptor, and what places and lengths in the file are to be multiples of; `None`
            where the file system reads all files through the cache.
        """
        if self._direct is None:
            self._direct = open_past_cache(self.fd) or ()
            if self._direct:
                weakref.finalize(self, _close, self._direct[0]).atexit = False
        return self._direct or None


def same_copy(status: os.stat_result) -> tuple[int, ...]:
    """Return what stays the same of a local copy, to which loads go on adding other bytes."""
    return status.st_dev, status.st_ino


def _close(fd: int) -> None:
    with contextlib.suppress(OSError):  # nothing was written: nothing is lost
        os.close(fd)
