"""How much memory a load takes above its destination."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from bench._cases import QUARTER
from bench._results import Goal, Memory, Results

if TYPE_CHECKING:
    from bench._cases import DenseCase, TableCase
    from bench._scale import Scale

pytestmark = pytest.mark.skipif(
    not Path("/proc/self/clear_refs").exists(), reason="needs Linux's high-water mark"
)


def peak(results: Results, folder: Path, case: str, what: str) -> Memory:
    command = [sys.executable, "-m", "bench._peak", case, results.scale, str(folder)]
    run = subprocess.run(command, check=True, capture_output=True, text=True)
    facts = json.loads(run.stdout)
    del facts["rows"]
    memory = Memory(case="M1", what=what, **facts)
    results.memories.append(memory)
    goal = Goal("≤", memory.allowed / 2**20)
    results.figure("M1", f"{what}, above the destination", memory.above / 2**20, "MiB", goal)
    return memory


def test_m1_dense(results: Results, folder: Path, dense: DenseCase) -> None:
    memory = peak(results, folder, "D1", "while D1 loads")

    assert memory.destination == sum(tensor.nbytes for tensor in dense.truth.values())
    assert memory.above <= memory.allowed


def test_m1_a_table(results: Results, folder: Path, scale: Scale, one_rank: TableCase) -> None:
    memory = peak(results, folder, "T1", "while T1 loads")

    assert memory.destination == scale.ids * (8 + 3 * 4 * scale.width)
    assert memory.above <= memory.allowed


def test_m1_a_quarter_of_a_table(results: Results, folder: Path, one_rank: TableCase) -> None:
    memory = peak(results, folder, "T4", "while T4 loads")

    quarter = one_rank.owned(QUARTER)
    row = 8 + sum(rows[:1].nbytes for rows in quarter.truth.slots.values())
    assert memory.destination == len(quarter.truth.ids) * row
    assert memory.above <= memory.allowed
