"""What it takes to begin: importing, and the first table of a process."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest

from bench._cases import TABLE
from bench._results import Goal, Results
from bench._truth import table_rows
from tests.oracle import write_checkpoint

if TYPE_CHECKING:
    from pathlib import Path

    from bench._scale import Scale


def python(*arguments: str, **environment: str) -> str:
    """Run this Python in a process of its own, and return what it printed."""
    run = subprocess.run(
        [sys.executable, *arguments],
        check=True,
        capture_output=True,
        text=True,
        env=os.environ | environment,
    )
    return run.stdout


IMPORTS = """
import time
begin = time.perf_counter()
import torch
middle = time.perf_counter()
from asyncloader import CheckpointReader, HashTable, Live, Loader, Saver
print(middle - begin, time.perf_counter() - middle)
"""


def test_i1_importing(results: Results, scale: Scale) -> None:
    """Both in one process: the difference of two processes is lost in what they differ anyway."""
    python("-c", IMPORTS)  # to warm up
    runs = [python("-c", IMPORTS).split() for _ in range(max(1, scale.rounds(7)))]

    alone = statistics.median(float(torch) for torch, _ in runs)
    more = statistics.median(float(ours) for _, ours in runs)
    results.figure("I1", "import torch", alone * 1e3, "ms")
    results.figure("I1", "importing from asyncloader after it", more * 1e3, "ms", Goal("≤", 60))


def test_i1_the_first_table(results: Results, tmp_path: Path, scale: Scale) -> None:
    """With a kernel cache that is empty, as on a new machine, and with one that is filled."""
    if scale.name == "tiny":
        pytest.skip("compiles for longer than a test should take")
    write_checkpoint(tmp_path / "small", {TABLE: table_rows(100, 4, ("embedding",))}, {})

    def first(cache: Path) -> dict[str, float]:
        output = python("-m", "bench._first", str(tmp_path / "small"), NUMBA_CACHE_DIR=str(cache))
        facts: dict[str, float] = json.loads(output)
        assert facts["ids"] == 100
        return facts

    cold = [first(tmp_path / f"cache-{number}") for number in range(2)]
    warm = [first(tmp_path / "cache-0") for _ in range(5)]

    for runs, when, most in ((cold, "on a machine", 2), (warm, "of a process later", 0.5)):
        made = statistics.median(one["made"] for one in runs)
        loaded = statistics.median(one["loaded"] for one in runs)
        results.figure("I1", f"first table {when}: made", made, "s", Goal("≤", most))
        results.figure("I1", f"first table {when}: made and loaded", loaded, "s", Goal("≤", most))
