"""The page cache: what of a file is in it, and how to get that in or out."""

from __future__ import annotations

import ctypes
import mmap
import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

STEP = 8 << 20


def warm(files: Iterable[Path]) -> None:
    """Read files once, so that the page cache holds them."""
    buffer = bytearray(STEP)
    for file in files:
        with file.open("rb", buffering=0) as opened:
            while opened.readinto(buffer):
                pass


def evict(files: Iterable[Path]) -> None:
    """Have the page cache let go of files; what is not on the disk yet is written first."""
    for file in files:
        fd = os.open(file, os.O_RDONLY)
        try:
            os.fsync(fd)
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(fd)


def cached(files: Iterable[Path]) -> float:
    """Return the share of the files' pages that the page cache holds."""
    counts = [_cached_pages(file) for file in files]
    return sum(held for held, _ in counts) / max(1, sum(pages for _, pages in counts))


def _cached_pages(file: Path) -> tuple[int, int]:
    """Ask `mincore`, which Python does not offer, nor `mmap` the address that it needs."""
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype = ctypes.c_void_p
    libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
    libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
    libc.mincore.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_char_p]
    size = file.stat().st_size
    if not size:
        return 0, 0
    pages = -(-size // mmap.PAGESIZE)
    fd = os.open(file, os.O_RDONLY)
    try:
        address = libc.mmap(None, size, mmap.PROT_READ, mmap.MAP_SHARED, fd, 0)
    finally:
        os.close(fd)
    if address == ctypes.c_void_p(-1).value:
        raise OSError(ctypes.get_errno(), f"cannot map {file}")
    try:
        answer = ctypes.create_string_buffer(pages)
        if libc.mincore(address, size, answer):
            raise OSError(ctypes.get_errno(), f"mincore of {file}")
        return sum(byte & 1 for byte in answer.raw), pages
    finally:
        libc.munmap(address, size)
