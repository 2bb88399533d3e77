"""Checkpoints for all benchmarks, and the tables at the end.

Without `--full` everything is tiny, and measured once, as a test.
"""

from __future__ import annotations

import asyncio
import ctypes
import gc
import os
import shutil
import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import uvloop
from rich.console import Console

from bench._cache import evict
from bench._cases import (
    DenseCase,
    TableCase,
    dense_case,
    dense_shapes,
    small_shapes,
    table_case,
)
from bench._pictures import draw
from bench._results import Results
from bench._scale import SCALES, Scale
from bench._tables import tables_of
from bench._truth import table_rows

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from tests.oracle import TableData

RESULTS = pytest.StashKey[Results]()
LATEST = Path(__file__).parent / "results" / "latest.json"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--full", action="store_true", help="measure at full size, as `make bench`")
    parser.addoption(
        "--bench-data",
        type=Path,
        metavar="DIR",
        help="where the benchmarks' checkpoints (some 22 GB) are kept for the next run; "
        "without, they are written to a temporary folder and removed",
    )


def pytest_configure(config: pytest.Config) -> None:
    config.stash[RESULTS] = Results("full" if config.getoption("full") else "tiny")


def pytest_terminal_summary(config: pytest.Config) -> None:
    results = config.stash[RESULTS]
    if not results:
        return
    console = Console(highlight=False)
    console.width = max(console.width, 110)  # in a log
    console.print(tables_of(results))
    if results.scale == "full":
        alone = not results.speeds
        stem = "serving" if results.latencies else "disk"
        written = LATEST.with_stem(stem) if alone else LATEST
        results.write(written)
        drawn = [] if alone else draw(results.speeds, results.growths, LATEST.parent)
        for path in (written, *drawn):
            console.print(f"[dim]Written: {os.path.relpath(path)}[/]")


@pytest.fixture(scope="session")
def results(request: pytest.FixtureRequest) -> Results:
    return request.config.stash[RESULTS]


@pytest.fixture(scope="session")
def scale(results: Results) -> Scale:
    return SCALES[results.scale]


@pytest.fixture(scope="session")
def keeping(request: pytest.FixtureRequest) -> bool:
    """Whether checkpoints are kept for the next run."""
    return request.config.getoption("bench_data") is not None


@pytest.fixture(scope="session")
def folder(request: pytest.FixtureRequest, scale: Scale) -> Iterator[Path]:
    """Yield the folder that checkpoints are written to."""
    with ExitStack() as stack:
        chosen: Path | None = request.config.getoption("bench_data")
        if chosen is None:
            # Not tmp_path: pytest keeps the folders of three runs.
            temporary = tempfile.TemporaryDirectory(prefix="asyncloader-bench-")
            chosen = Path(stack.enter_context(temporary))
        path = chosen / scale.name
        path.mkdir(parents=True, exist_ok=True)
        yield path


@pytest.fixture(scope="session")
def runner() -> Iterator[asyncio.Runner]:
    """Yield what runs coroutines on one uvloop."""
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        yield runner


@pytest.fixture(scope="module", autouse=True)
def clean_memory(folder: Path) -> Iterator[None]:
    """Give back what a module holds: page cache, and memory that malloc keeps for later."""
    yield
    gc.collect()
    evict(file for file in folder.rglob("*") if file.is_file())
    if hasattr(libc := ctypes.CDLL(None), "malloc_trim"):
        libc.malloc_trim(0)


@pytest.fixture(scope="module")
def scratch(folder: Path, keeping: bool) -> Iterator[Callable[[str], Path]]:
    """Yield what names a folder that only this module needs."""
    named: list[str] = []

    def path(name: str) -> Path:
        named.append(name)
        return folder / name

    yield path
    for name in [] if keeping else named:
        for related in folder.glob(f"{name}*"):  # and the formats of peers
            shutil.rmtree(related)


# Of a module each: what one holds in memory is given back before the next one needs it.
@pytest.fixture(scope="module")
def dense(folder: Path, scale: Scale) -> DenseCase:
    return dense_case(folder / "dense", dense_shapes(scale), writers=16)


@pytest.fixture(scope="module")
def small(scratch: Callable[[str], Path], scale: Scale) -> DenseCase:
    return dense_case(scratch("small"), small_shapes(scale), writers=4)


@pytest.fixture(scope="module")
def rows(scale: Scale) -> TableData:
    return table_rows(scale.ids, scale.width)


@pytest.fixture(scope="module")
def one_rank(folder: Path, rows: TableData) -> TableCase:
    return table_case(folder / "table-1", rows, ranks=1)


@pytest.fixture(scope="module")
def four_ranks(folder: Path, rows: TableData) -> TableCase:
    return table_case(folder / "table-4", rows, ranks=4)
