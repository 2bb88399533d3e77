"""Several ranks save into one folder, each in a process of its own."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from asyncloader import HashTable, Loader, gen_slice
from tests.forks import Forked
from tests.oracle import read_checkpoint, read_parts

ROOT = Path(__file__).resolve().parents[1]

RANK = """
import sys, pathlib
import torch
from asyncloader import HashTable, Saver, gen_slice

path, rank, ranks, save_id, rendezvous = sys.argv[1:]
rank, ranks = int(rank), int(ranks)
if rendezvous:
    torch.distributed.init_process_group(
        "gloo", f"file://{rendezvous}", rank=rank, world_size=ranks
    )
part = gen_slice(rank, ranks)
table = HashTable([4], name="t", slice=part)
ids = torch.tensor([id_ for id_ in range(-5000, 5000) if part.accepts(id_)])
table.insert(ids, ids[:, None].expand(-1, 4).float())
for step in (1, 2) if rendezvous else (1,):
    saver = Saver(
        rank, ranks, 2, path, {"t": table}, {"step": torch.tensor(step)},
        save_id=save_id or None, timeout=60,
    )
    print(saver.save())
    if rendezvous:
        torch.distributed.barrier()  # the checkpoint is replaced while nobody else is at it
if rendezvous:
    torch.distributed.destroy_process_group()
"""


def run_ranks(path: Path, ranks: int, *, save_id: str = "", rendezvous: str = "") -> None:
    """Start the ranks, the last one first, and wait for all."""
    processes = [
        Forked(
            ["-c", RANK, path, str(rank), str(ranks), save_id, rendezvous],
            env={**os.environ, "GLOO_SOCKET_IFNAME": "lo"},
        )
        for rank in reversed(range(ranks))
    ]
    for process in processes:
        _, errors = process.communicate(timeout=100)
        assert process.returncode == 0, errors


@pytest.mark.slow
@pytest.mark.timeout(150)
@pytest.mark.parametrize("how", ["save_id", "torch.distributed"])
def test_ranks_in_separate_processes_make_one_checkpoint(tmp_path: Path, how: str) -> None:
    """By torch.distributed they save twice, the second time over the first."""
    path = tmp_path / "checkpoint"
    if how == "save_id":
        run_ranks(path, 3, save_id="step-1")
    else:
        run_ranks(path, 3, rendezvous=str(tmp_path / "rendezvous"))
    parts, tensors = read_parts(path)
    assert tensors["step"].item() == (1 if how == "save_id" else 2)
    assert [tuple(part.claim) for part in parts["t"]] == [
        (part.begin, part.end, part.size) for part in (gen_slice(rank, 3) for rank in range(3))
    ]
    tables, _ = read_checkpoint(path)
    assert torch.equal(tables["t"].ids.sort().values, torch.arange(-5000, 5000))
    assert not list(path.glob(".saving*"))
    for ranks in (1, 2):  # and any other number of ranks loads it
        held = []
        for rank in range(ranks):
            table = HashTable([4], name="t", slice=gen_slice(rank, ranks))
            Loader(path, {"t": table}, strict=True, verify="require").load()
            assert torch.equal(table.rows()[:, 0], table.ids().float())
            held.append(table.ids())
        assert torch.equal(torch.cat(held).sort().values, torch.arange(-5000, 5000))
