"""What somebody may put into a checkpoint's folder to have other files read, and who reads them."""

from __future__ import annotations

import contextlib
import ctypes
import os
import sys
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

_OPENED, _READ = 0x20, 0x01
_NONBLOCK = 0o4000


@contextlib.contextmanager
def untouched(folder: Path) -> Iterator[None]:
    """Check that nobody opens, or reads from, a file in a folder for the length of the block.

    The kernel says so, whatever path or link was followed.
    """
    if sys.platform != "linux":
        pytest.skip("needs inotify")
    library = ctypes.CDLL(None, use_errno=True)
    fd = library.inotify_init1(_NONBLOCK)
    assert fd >= 0
    try:
        assert library.inotify_add_watch(fd, os.fsencode(folder), _OPENED | _READ) >= 0
        yield
        with pytest.raises(BlockingIOError):  # no event
            os.read(fd, 4096)
    finally:
        os.close(fd)
