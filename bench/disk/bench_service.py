"""How late a service answers whose table is ten times as large as its memory."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch

from asyncloader import HashTable, Saver
from bench._cache import evict
from bench._rows import RowsCase, rows_case
from bench.disk.bench_rows import WIDTH, batches
from bench.serving._processes import RATE, asking, fetch, serving
from examples.serve import model

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from bench._results import Results
    from bench._scale import Scale

ITEMS = 50
USERS = 1000
LESS = 10
LEAST = 1 << 30
WIDER = ("--full-speed", "--width")
CACHE = 64
WAYS = {
    "rows on the disk, no cache": ("--disk",),
    f"rows on the disk, a cache of {CACHE} MiB": ("--disk", "--cache", str(CACHE)),
    "all in memory, without a limit": (),
}


@contextlib.contextmanager
def limited(nbytes: int) -> Iterator[Sequence[str]]:
    """Yield a command that runs the one behind it with so much memory, page cache included.

    Makes a control group, of version 1 or 2, or skips the case.
    """
    first = Path("/sys/fs/cgroup/memory")
    base, bound = (first, "limit_in_bytes") if first.is_dir() else (first.parent, "max")
    folder = base / f"asyncloader-bench-{os.getpid()}"
    try:
        folder.mkdir()
        (folder / f"memory.{bound}").write_text(str(nbytes))
    except OSError as error:
        pytest.skip(f"no control group with a bound for memory can be made here: {error}")
    try:
        yield ("sh", "-c", f'echo $$ > {folder}/cgroup.procs && exec "$@"', "sh")
    finally:
        folder.rmdir()


@pytest.fixture(scope="module")
def rows(scratch: Callable[[str], Path], scale: Scale) -> RowsCase:
    return rows_case(scratch("rows"), count=scale.rows_on_disk, width=WIDTH)


def run_of(rows: RowsCase, run: Path) -> None:
    """Make a version of the example's model of which these are the items."""
    users, version = HashTable([model.WIDTH], name="user_emb"), run / "v1"
    users.insert(torch.arange(USERS), torch.randn(USERS, model.WIDTH))
    Saver(path=version, hashtables={"user_emb": users}, tensors=model.tower(1)).save()
    (version / "asyncloader.json").unlink()  # it does not know the items
    os.link(rows.shard, version / rows.shard.name)
    for name in ("index", "tensorkey.json"):
        held, more = (json.loads((path / name).read_text()) for path in (version, rows.path))
        if name == "index":
            number = len(held["file_index"])
            held["file_index"][rows.shard.name] = number
            held["block_index"] |= dict.fromkeys(more["block_index"], number)
        else:
            held |= more
        (version / name).write_text(json.dumps(held))


def test_k8_a_service_whose_table_is_ten_times_its_memory(
    rows: RowsCase,
    results: Results,
    scale: Scale,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Ids are as users' are (Zipf 1.05); an answer of `/rank` counts from when it was due."""
    monkeypatch.setattr(model, "WIDTH", rows.width // 4)
    run, ids = rows.path.parent / "rows-run", tmp_path / "ids"
    seconds = round(scale.served_seconds)
    wanted = batches(rows.all_ids(), ITEMS * RATE * seconds, zipf=1.05)
    with contextlib.ExitStack() as stack:
        stack.callback(remove, run)
        run_of(rows, run)
        for name, how in WAYS.items():
            evict([rows.shard])
            room = (
                limited(max(rows.count * rows.width // LESS, LEAST))
                if how
                else contextlib.nullcontext(())
            )
            with (
                room as within,
                serving(run, (*WIDER, str(model.WIDTH), *how), within=within) as url,
            ):
                for _ in range(2):  # the first time fills caches
                    next(wanted).numpy().tofile(ids)
                    found = asking(f"{url}/rank", seconds, "--ids", str(ids))()
                state = json.loads(fetch(f"{url}/model"))
            assert not found["failed"], f"{name}: {found['failed']} requests failed"
            assert state["serving"] == "v1"
            for share in (50, 99):
                late = float(np.percentile(found["late"], share)) * 1e3
                results.figure("K8", f"{name}: p{share} of /rank", late, "ms")


def remove(run: Path) -> None:
    """Remove a run folder; what its files are links to stays."""
    if run.exists():
        shutil.rmtree(run)
