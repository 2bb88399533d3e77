"""How fast checkpoints are saved, and what verifying them costs when they are loaded."""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from typing import TYPE_CHECKING

import pytest

from asyncloader import Loader, Saver
from bench._cases import TABLE, dense_shapes, table_loader, touched
from bench._measure import alternate
from bench._results import Results, Speed
from examples.made_up import empty_table

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Callable
    from pathlib import Path

    from pytest_benchmark.fixture import BenchmarkFixture

    from asyncloader import HashTable
    from bench._cases import Scale, TableCase

ROUNDS = 5


def dd(path: Path, nbytes: int) -> float:
    """Write as many zeros as `dd` does it, up to the disk, and return the seconds that took."""
    command = [
        "dd", "if=/dev/zero", f"of={path}", "bs=16M", "iflag=count_bytes", f"count={nbytes}",
        "conv=fsync", "status=none",
    ]  # fmt: skip
    os.sync()
    start = time.perf_counter()
    subprocess.run(command, check=True)
    seconds = time.perf_counter() - start
    path.unlink()
    os.sync()
    return seconds


def measure(
    benchmark: BenchmarkFixture,
    folder: Path,
    nbytes: int,
    save: Callable[[Path], object],
    check: Callable[[Path], None],
) -> tuple[list[float], list[float]]:
    """Save into a new folder and let `dd` write as many bytes, in turn."""
    if shutil.which("dd") is None:
        pytest.skip("needs dd")
    folder.mkdir(parents=True, exist_ok=True)
    target = folder / "saved"

    def checked(path: Path) -> None:
        check(path)
        shutil.rmtree(path)

    return alternate(
        benchmark,
        rounds=ROUNDS,
        fresh=0,
        raw=lambda: dd(folder / "dd", nbytes),
        prepare=lambda: target,
        load=save,
        check=checked,
    )


def full_table(case: TableCase) -> HashTable:
    table = case.table()
    Loader(case.path, {TABLE: table}).load()
    return table


def test_w1_a_table(
    benchmark: BenchmarkFixture, folder: Path, one_rank: TableCase, results: Results
) -> None:
    """Its rows lie in random order, and are sorted."""
    table = full_table(one_rank)
    nbytes = sum(file.stat().st_size for file in one_rank.path.iterdir())

    def check(path: Path) -> None:
        again = one_rank.table()
        Loader(path, {TABLE: again}, strict=True, verify="require").load()
        one_rank.check(again)

    saves, dds = measure(
        benchmark,
        folder / "w1",
        nbytes,
        lambda path: Saver(path=path, hashtables={TABLE: table}).save(),
        check,
    )
    results.speeds.append(
        Speed(
            case="W1",
            what=f"save {len(table):,} ids",
            nbytes=nbytes,
            load_seconds=saves,
            raw_seconds=dds,
            goal=0.6,
        )
    )


def test_w2_dense_tensors(
    benchmark: BenchmarkFixture, folder: Path, scale: Scale, results: Results
) -> None:
    tensors = touched(dense_shapes(scale))
    nbytes = sum(tensor.nbytes for tensor in tensors.values())

    def check(path: Path) -> None:
        again = {name: tensor * 0 for name, tensor in tensors.items()}
        Loader(path, tensors=again, strict=True, verify="require").load()
        assert all(bool((again[name] == tensor).all()) for name, tensor in tensors.items())

    saves, dds = measure(
        benchmark,
        folder / "w2",
        nbytes,
        lambda path: Saver(path=path, tensors=tensors).save(),
        check,
    )
    results.speeds.append(
        Speed(
            case="W2",
            what=f"save {nbytes / 2**20:,.0f} MiB dense",
            nbytes=nbytes,
            load_seconds=saves,
            raw_seconds=dds,
            goal=0.6,
        )
    )


def test_v1_a_table_with_and_without_verifying(
    benchmark: BenchmarkFixture,
    folder: Path,
    one_rank: TableCase,
    runner: asyncio.Runner,
    results: Results,
) -> None:
    """Here `raw` is the same load with verify="off"."""
    path = folder / "v1"
    Saver(path=path, hashtables={TABLE: full_table(one_rank)}, parallel=4).save()
    os.sync()
    nbytes = sum(file.stat().st_size for file in path.iterdir())

    def unverified() -> float:
        table = empty_table(TABLE, one_rank.truth)
        start = time.perf_counter()
        runner.run(Loader(path, {TABLE: table}, verify="off").aload())
        return time.perf_counter() - start

    def load(table: HashTable) -> None:
        report = runner.run(table_loader(path, table).aload())
        assert report.bytes_verified == report.bytes_wanted

    verified, off = alternate(
        benchmark,
        rounds=ROUNDS,
        fresh=nbytes,
        raw=unverified,
        prepare=one_rank.table,
        load=load,
        check=one_rank.check,
    )
    shutil.rmtree(path)
    results.speeds.append(
        Speed(
            case="V1",
            what="T1 verified, beside not",
            nbytes=nbytes,
            load_seconds=verified,
            raw_seconds=off,
            goal=None,
        )
    )
