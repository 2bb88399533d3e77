"""Checkpoints for all benchmarks, and the tables at the end.

With `--benchmark-disable`, the default of pytest in this project, everything is tiny.
"""

from __future__ import annotations

import asyncio
import os
import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import uvloop
from rich.console import Console

from bench._cases import (
    FULL,
    TINY,
    DenseCase,
    Scale,
    TableCase,
    dense_case,
    dense_shapes,
    quarter_of,
    small_shapes,
    table_case,
    table_truth,
)
from bench._results import Results

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.oracle import TableData

RESULTS = pytest.StashKey[Results]()
LATEST = Path(__file__).parent / "results" / "latest.json"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--bench-data",
        type=Path,
        metavar="DIR",
        help="where the benchmarks' checkpoints (some 5 GB) are kept for the next run; "
        "without, they are written to a temporary folder and removed",
    )


def pytest_configure(config: pytest.Config) -> None:
    config.stash[RESULTS] = Results("full" if config.getoption("benchmark_enable") else "tiny")
    # The tables below say it all, on half the width.
    config.option.benchmark_quiet = True


def pytest_terminal_summary(config: pytest.Config) -> None:
    results = config.stash[RESULTS]
    if not (results.speeds or results.memories or results.lags):
        return
    console = Console(highlight=False)
    console.print()
    console.print(results)
    if results.scale == "full":
        results.write(LATEST)
        console.print(f"[dim]Written to {os.path.relpath(LATEST)}[/]")


@pytest.fixture(scope="session")
def results(request: pytest.FixtureRequest) -> Results:
    return request.config.stash[RESULTS]


@pytest.fixture(scope="session")
def scale(results: Results) -> Scale:
    return FULL if results.scale == "full" else TINY


@pytest.fixture(scope="session")
def folder(request: pytest.FixtureRequest, scale: Scale) -> Iterator[Path]:
    """Yield the folder that checkpoints are written to."""
    with ExitStack() as stack:
        chosen: Path | None = request.config.getoption("bench_data")
        if chosen is None:
            # Not tmp_path: pytest keeps the folders of three runs.
            temporary = tempfile.TemporaryDirectory(prefix="asyncloader-bench-")
            chosen = Path(stack.enter_context(temporary))
        yield chosen / scale.name


@pytest.fixture(scope="session")
def runner() -> Iterator[asyncio.Runner]:
    """Yield what runs coroutines on one uvloop."""
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        yield runner


# Of a module each: what one holds in memory is given back before the next one needs it.
@pytest.fixture(scope="module")
def dense(folder: Path, scale: Scale) -> DenseCase:
    return dense_case(folder / "dense", dense_shapes(scale))


@pytest.fixture(scope="module")
def small(folder: Path, scale: Scale) -> DenseCase:
    return dense_case(folder / "small", small_shapes(scale))


@pytest.fixture(scope="module")
def rows(scale: Scale) -> TableData:
    return table_truth(scale)


@pytest.fixture(scope="module")
def one_rank(folder: Path, rows: TableData) -> TableCase:
    return table_case(folder / "table-1", rows, ranks=1)


@pytest.fixture(scope="module")
def four_ranks(folder: Path, rows: TableData) -> TableCase:
    return table_case(folder / "table-4", rows, ranks=4)


@pytest.fixture(scope="module")
def quarter(one_rank: TableCase) -> TableCase:
    return quarter_of(one_rank)
