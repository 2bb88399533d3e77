"""The programs of the servers, installed where neither asyncloader nor its user sees them.

`python -m tests.servers.environments` installs all of them, as CI does before it tests.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

from tests.servers.child import UnavailableError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

SWIFT = ["swift==2.38.3"]
"""Its wheels bring liberasurecode and everything else that it needs."""

AZURITE = ["azurite@3.35.0"]

PATIENCE = 240.0
"""Seconds for one installation."""


def root() -> Path:
    """Where the programs are kept: the folder `ASYNCLOADER_SERVERS`, or one in the user's cache."""
    given = os.environ.get("ASYNCLOADER_SERVERS")
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(given) if given else Path(cache) / "asyncloader" / "servers"


def python_with(requirements: list[str]) -> Path:
    """Make a virtual environment once, and return its Python.

    Raises:
        UnavailableError: pip could not install the requirements.
    """

    def install(folder: Path) -> None:
        _run([sys.executable, "-m", "venv", folder])
        _run([
            folder / "bin/python", "-m", "pip", "install", "--quiet",
            "--disable-pip-version-check", "--retries", "2", *requirements,
        ])  # fmt: skip

    return _once(requirements, install) / "bin/python"


def node_with(requirements: list[str]) -> Path:
    """Install packages of npm once, and return their `node_modules`.

    Raises:
        UnavailableError: There is no npm, or it could not install them.
    """
    npm = shutil.which("npm")
    if npm is None or shutil.which("node") is None:
        raise UnavailableError("node and npm are not installed")

    def install(folder: Path) -> None:
        _run([
            npm, "install", "--no-audit", "--no-fund", "--ignore-scripts",
            "--loglevel=error", "--fetch-retries=1", "--prefix", folder, *requirements,
        ])  # fmt: skip

    return _once(requirements, install) / "node_modules"


def _once(requirements: list[str], install: Callable[[Path], None]) -> Path:
    """Install into a folder named by what is in it; other processes wait, or find it ready."""
    told = "\n".join([sys.version, *requirements])
    name = f"{requirements[0].split('=')[0].split('@')[0]}-{_digest(told)}"
    folder, complete = root() / name, root() / name / "complete"
    with _held(root() / f"{name}.lock"):
        if not complete.exists():
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir()
            install(folder)
            complete.touch()
    return folder


def _digest(told: str) -> str:
    return hashlib.sha256(told.encode()).hexdigest()[:12]


@contextlib.contextmanager
def _held(lock: Path) -> Iterator[None]:
    lock.parent.mkdir(parents=True, exist_ok=True)
    with lock.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _run(command: list[str | Path]) -> None:
    try:
        subprocess.run(command, check=True, capture_output=True, text=True, timeout=PATIENCE)
    except (subprocess.CalledProcessError, subprocess.TimeoutExpired, OSError) as error:
        said = str(getattr(error, "stderr", None) or "")[-500:]
        raise UnavailableError(f"{error}: {said}") from error


def main() -> None:
    for make, requirements in (
        (python_with, SWIFT),
        (node_with, AZURITE),
    ):
        start = time.monotonic()
        try:
            state = str(make(requirements))
        except UnavailableError as error:
            state = f"not installed, its tests are skipped: {error}"
        print(f"{requirements[0]} ({time.monotonic() - start:.0f} s): {state}")  # noqa: T201


if __name__ == "__main__":
    main()
