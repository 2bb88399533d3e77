"""File systems of a test's own: small disks, read-only ones. Where nobody may mount, it is skipped.

Who may depends on more than being root (containers forbid it), so it is tried.
"""

from __future__ import annotations

import contextlib
import shutil
import subprocess
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

_PATIENCE = 20


@contextlib.contextmanager
def small_disk(path: Path, kib: int) -> Iterator[Path]:
    """Have an empty file system of so many KiB at `path` for the length of the block."""
    path.mkdir(exist_ok=True)
    if shutil.which("mount") is None:
        pytest.skip("needs mount")
    done = _call("mount", "-t", "tmpfs", "-o", f"size={kib}k", "none", str(path))
    if done.returncode:
        pytest.skip(f"nothing can be mounted here: {done.stderr.strip()}")
    try:
        yield path
    finally:
        unmount(path)


def resize(path: Path, kib: int) -> None:
    """Make a small disk larger or smaller."""
    _call("mount", "-o", f"remount,size={kib}k", str(path)).check_returncode()


def make_read_only(path: Path) -> None:
    """Let nobody write to a small disk any more, root neither."""
    _call("mount", "-o", "remount,ro", str(path)).check_returncode()


def used(path: Path) -> int:
    """Return how many KiB of a small disk are taken."""
    usage = shutil.disk_usage(path)
    return usage.used >> 10


def unmount(path: Path) -> None:
    """Take a file system away, whoever still uses it."""
    _call("umount", "-l", str(path)).check_returncode()


def _call(*command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, capture_output=True, text=True, timeout=_PATIENCE, check=False)
