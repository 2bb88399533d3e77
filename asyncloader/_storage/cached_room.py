"""What copies are called, and which of them go when others want their room."""

from __future__ import annotations

import hashlib
import os
import re
from typing import TYPE_CHECKING

from .cached_copy import DATA, last_use, remove

if TYPE_CHECKING:
    from pathlib import Path


# Written at a time before room is looked for, and what is there is recorded: a killed load loses
# no more, and processes go beyond the bound by no more.
_STEP = 256 << 20
_STEPS = 16  # or as many of all that there may be
_SPARE = 0.1  # of a disk, where no bound is given
_LETTERS = 32
_NAME = re.compile(rf"[0-9a-f]{{{_LETTERS}}}-[0-9a-f]{{{_LETTERS}}}{re.escape(DATA)}")
_BLOCK = 512  # bytes of which `st_blocks` counts


def name_of(url: str, what: str) -> str:
    """Return the name of an object's copy."""
    return f"{first_of_name(url)}-{first_of_name(what)}{DATA}"


def first_of_name(url: str) -> str:
    """Return what the names of all copies of an object begin with."""
    return hashlib.sha256(url.encode()).hexdigest()[:_LETTERS]


def make_room(folder: Path, nbytes: int, most: int | None, writing: int) -> int:
    """Remove what was not used for longest, until there is room; return how much to use.

    Args:
        folder: Of the copies.
        nbytes: That are wanted at least.
        most: That there may be; `None` leaves a tenth of the disk free.
        writing: Bytes that the disk may not show yet.
    """
    mine = [file for file in folder.iterdir() if _NAME.fullmatch(file.name)]
    copies = sorted((last_use(path), path) for path in mine)
    sizes = {path: path.lstat().st_blocks * _BLOCK for path in mine}
    held = sum(sizes.values()) + writing
    if most is None:
        disk = os.statvfs(folder)
        most = round((held + disk.f_bavail * disk.f_frsize) * (1 - _SPARE))
    step = max(nbytes, min(_STEP, most // _STEPS))
    for _, path in copies:
        if held + step <= most:
            break
        if remove(path):
            held -= sizes[path]
    return min(most - held, step)
