from __future__ import annotations

import errno
import os
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from asyncloader._table.compiling import Compiler

if TYPE_CHECKING:
    from collections.abc import Callable

ROOT = Path(__file__).resolve().parents[1]


def plus_one(number: int) -> int:
    return number + 1


class NoPlace:
    """What Numba says where no folder can be written to."""

    def __init__(self, function: Callable[..., object]) -> None:
        raise RuntimeError(f"cannot cache function {function}: no locator available")


class ReadOnly(NoPlace):
    def __init__(self, function: Callable[..., object]) -> None:
        raise OSError(errno.EROFS, "Read-only file system")


class Full:
    """A cache that is empty, and whose disk is full."""

    def __init__(self, function: Callable[..., object]) -> None: ...

    def load_overload(self, sig: object, target_context: object) -> None: ...

    def save_overload(self, sig: object, data: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")


class Damaged(Full):
    """A cache that cannot be read, or mended."""

    def load_overload(self, sig: object, target_context: object) -> None:
        raise EOFError("Ran out of input")

    def flush(self) -> None:
        raise OSError(errno.EROFS, "Read-only file system")


@pytest.mark.parametrize("cache", [NoPlace, ReadOnly, Full, Damaged])
def test_a_cache_that_fails_costs_time_and_is_told_once(
    cache: Callable[[Callable[..., object]], object], caplog: pytest.LogCaptureFixture
) -> None:
    """A container with a read-only root, or a node whose disk is full, could make no table."""
    kernel = Compiler(cache)
    assert kernel("i8(i8)")(plus_one)(1) == 2
    assert kernel("i8(i8)")(plus_one)(2) == 3
    assert caplog.text.count("Set NUMBA_CACHE_DIR to a folder") == 1


DAMAGE = """
import logging, pathlib, sys
from asyncloader._table.compiling import Compiler, KernelCache
from kernel import plus_one

class Told(logging.Handler):
    def emit(self, record):
        told.append(record.getMessage())

told = []
logging.getLogger("asyncloader").addHandler(Told())

def compiled():
    told.clear()
    kernel = Compiler(KernelCache)("i8(i8)")(plus_one)
    assert kernel(1) == 2
    return sum(kernel.stats.cache_hits.values())

assert (compiled(), told) == (0, [])
assert (compiled(), told) == (1, [])
for ending in ("nbi", "nbc"):
    [file] = pathlib.Path(sys.argv[1]).rglob(f"*.{ending}")
    whole = file.read_bytes()
    for damaged in (b"", whole[:100], bytes(len(whole)), whole[:-200] + bytes(200)):
        file.write_bytes(damaged)
        assert compiled() == 0, (ending, damaged[:10])
        assert len(told) == 1, told
        assert (compiled(), told) == (1, []), "it was not mended"
code = whole.replace(b"plus_one", b"plus-one")
assert code != whole
file.write_bytes(code)
assert compiled() == 0 and len(told) == 1, "a wrong byte that unpickles"
"""


def test_a_damaged_cache_is_compiled_anew_and_mended(tmp_path: Path) -> None:
    """A node that loses power leaves files that are cut, or of zeros."""
    (tmp_path / "kernel.py").write_text("def plus_one(number):\n    return number + 1\n")
    cache = tmp_path / "cache"
    env = os.environ | {
        "NUMBA_CACHE_DIR": str(cache),
        "PYTHONPATH": os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", str(ROOT))]),
    }
    command = [sys.executable, "-c", textwrap.dedent(DAMAGE), str(cache)]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


STALE = """
from asyncloader._table.compiling import Compiler, KernelCache
from kernel import plus

kernel = Compiler(KernelCache)("i8(i8)")(plus)
print(kernel(1), sum(kernel.stats.cache_hits.values()))
"""


def test_a_cache_goes_by_the_text_of_a_kernel_and_not_by_its_time(tmp_path: Path) -> None:
    """The files of a wheel may all have one time, those of the next release, too."""
    env = os.environ | {
        "NUMBA_CACHE_DIR": str(tmp_path / "cache"),
        "PYTHONPATH": os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", str(ROOT))]),
        "PYTHONDONTWRITEBYTECODE": "1",
    }
    said = []
    for addend in (1, 1, 2):
        (tmp_path / "kernel.py").write_text(f"def plus(number):\n    return number + {addend}\n")
        os.utime(tmp_path / "kernel.py", (1, 1))
        command = [sys.executable, "-c", STALE]
        done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        said.append(done.stdout.split())
    assert said == [["2", "0"], ["2", "1"], ["3", "0"]]
