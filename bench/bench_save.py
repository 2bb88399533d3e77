"""How fast checkpoints are saved, and what verifying them costs when they are loaded."""

from __future__ import annotations

import os
import shutil
import subprocess
from functools import partial
from typing import TYPE_CHECKING

import pytest

from asyncloader import Loader, Saver
from bench._cases import TABLE, DenseCase, TableCase, table_loader
from bench._measure import Contender, interleave, named
from bench._raw import room_for, shards
from bench._results import Goal, Results, Speed, against_raw

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Callable
    from pathlib import Path

    from asyncloader import HashTable
    from bench._measure import Role
    from bench._scale import Scale

ROUNDS = 4


def dd(nbytes: int, path: Path) -> None:
    """Write as many zeros as `dd` does it, up to the disk."""
    command = [
        "dd", "if=/dev/zero", f"of={path}", "bs=16M", "iflag=count_bytes", f"count={nbytes}",
        "conv=fsync", "status=none",
    ]  # fmt: skip
    subprocess.run(command, check=True)


def empty_disk(path: Path) -> Path:
    """Return a path at which nothing is, with nothing left for the system to write."""
    if path.is_dir():
        shutil.rmtree(path)
    path.unlink(missing_ok=True)
    os.sync()
    return path


def measure(
    *,
    folder: Path,
    case: str,
    what: str,
    nbytes: int,
    saver: Callable[[Path], Saver],
    check: Callable[[Path], None],
    rounds: int,
) -> Speed:
    """Save into a new folder and let `dd` write as many bytes, in turn."""
    if shutil.which("dd") is None:
        pytest.skip("needs dd")

    def save(path: Path) -> Path:
        saver(path).save()
        return path

    target, zeros = folder / f"{case}-saved", folder / f"{case}-dd"
    times = interleave(
        [
            Contender(
                name="dd conv=fsync",
                role="raw",
                prepare=partial(empty_disk, zeros),
                run=partial(dd, nbytes),
            ),
            Contender(
                name="asyncloader",
                role="ours",
                prepare=partial(empty_disk, target),
                run=save,
                check=check,
            ),
        ],
        rounds=rounds,
    )
    empty_disk(target)
    empty_disk(zeros)
    return Speed(case=case, what=what, nbytes=nbytes, times=times)


def test_w1_a_table(folder: Path, one_rank: TableCase, results: Results, scale: Scale) -> None:
    """Its rows lie in random order, and are sorted."""
    table = one_rank.full_table()

    def check(path: Path) -> None:
        again = one_rank.table()
        Loader(path, {TABLE: again}, strict=True, verify="require").load()
        one_rank.check(again)

    speed = measure(
        folder=folder,
        case="W1",
        what=f"save {len(table):,} ids",
        nbytes=one_rank.nbytes,
        saver=lambda path: Saver(path=path, hashtables={TABLE: table}),
        check=check,
        rounds=scale.rounds(ROUNDS),
    )

    results.speeds.append(speed)
    against_raw(results, speed, Goal("≥", 0.6))


def test_w2_dense_tensors(folder: Path, dense: DenseCase, results: Results, scale: Scale) -> None:
    tensors = {name: tensor.clone() for name, tensor in dense.truth.items()}

    def check(path: Path) -> None:
        again = dense.destination()
        Loader(path, tensors=again, strict=True, verify="require").load()
        dense.check(again)

    speed = measure(
        folder=folder,
        case="W2",
        what=f"save {dense.nbytes / 2**20:,.0f} MiB of tensors",
        nbytes=dense.nbytes,
        saver=lambda path: Saver(path=path, tensors=tensors),
        check=check,
        rounds=scale.rounds(ROUNDS),
    )

    results.speeds.append(speed)
    against_raw(results, speed, Goal("≥", 0.6))


def test_v1_a_table_with_and_without_verifying(
    folder: Path, one_rank: TableCase, runner: asyncio.Runner, results: Results, scale: Scale
) -> None:
    path = empty_disk(folder / "V1")
    Saver(path=path, hashtables={TABLE: one_rank.full_table()}, parallel=4).save()
    os.sync()

    def unverified(table: HashTable) -> HashTable:
        runner.run(Loader(path, {TABLE: table}, verify="off").aload())
        return table

    def verified(table: HashTable) -> HashTable:
        report = runner.run(table_loader(path, table).aload())
        assert report.bytes_verified == report.bytes_wanted
        return table

    def contender(name: str, role: Role, run: Callable[[HashTable], HashTable]) -> Contender:
        return Contender(
            name=name,
            role=role,
            prepare=one_rank.table,
            run=run,
            check=one_rank.check,
            fresh=room_for(shards(path)),
        )

    times = interleave(
        [
            contender("asyncloader, not verified", "variant", unverified),
            contender("asyncloader, verified", "ours", verified),
        ],
        rounds=scale.rounds(ROUNDS),
    )
    empty_disk(path)

    speed = Speed(case="V1", what="the ids of W1, loaded", nbytes=one_rank.nbytes, times=times)
    results.speeds.append(speed)
    ratio = named(times, "asyncloader, not verified").median
    ratio /= named(times, "asyncloader, verified").median
    results.figure("V1", "load that verifies", ratio, "of one that does not")
