"""Checkpoints that the commands are tried on, and running these in a process of their own."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch

from asyncloader import ReadOptions, Saver, gen_slice
from tests.forks import python
from tests.oracle import TableData, flat_bytes, rows_of
from tests.support import data, table_for

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

    from asyncloader import HashTable, Slice

GENUINE = Path(__file__).parent / "data" / "recis"
LIMITS = ReadOptions(parallel=4, chunk_bytes=1 << 20, max_inflight_bytes=4 << 20)

TABLES = {
    "user@emb": data([*range(0, 4000, 13), -1, -(2**63), 2**63 - 1], width=3, exp_avg=3, filter=1),
    "item": data([*range(1, 500, 2)], width=2),
}
TENSORS = {
    "w": torch.arange(60.0).view(20, 3),
    "step": torch.tensor(7),
    "mask": torch.tensor([True, False] * 20),
    "half": torch.arange(8).bfloat16(),
    "layer/part_0": torch.arange(5),
    "none": torch.zeros(0, 4),
}


def filled(content: TableData, *, name: str, part: Slice | None = None) -> HashTable:
    """Make a table that holds those rows of some content that lie in its slice."""
    table = table_for(content, name=name, slice=part)
    keep = torch.tensor([part is None or part.accepts(id_) for id_ in content.ids.tolist()])
    for slot, rows in content.slots.items():
        table.insert(content.ids[keep], rows[keep], slot)
    return table


def save(
    path: Path,
    *,
    tables: Mapping[str, TableData] = TABLES,
    tensors: Mapping[str, Tensor] = TENSORS,
    ranks: int = 2,
    parallel: int = 2,
    size: int = 65536,
) -> Path:
    """Save all of it, as so many ranks do, and return the path."""
    for rank in reversed(range(ranks)):
        part = gen_slice(rank, ranks, size)
        made = {name: filled(table, name=name, part=part) for name, table in tables.items()}
        Saver(rank, ranks, parallel, path, made, tensors, save_id="first").save()
    return path


def everything(
    content: tuple[Mapping[str, TableData], Mapping[str, Tensor]],
) -> tuple[object, object]:
    """Return what a checkpoint holds, in an order that does not depend on how it is cut."""
    tables, tensors = content
    by_id = {name: rows_of(table.ids, dict(table.slots)) for name, table in tables.items()}
    plain = {
        name: (tensor.dtype, tensor.shape, flat_bytes(tensor).numpy().tobytes())
        for name, tensor in tensors.items()
    }
    return by_id, plain


def flip(path: Path, offset: int, by: int = 1) -> None:
    """Change one byte of a file; a negative offset counts from its end."""
    content = bytearray(path.read_bytes())
    content[offset] ^= by
    path.write_bytes(content)


def run(*arguments: str | Path) -> tuple[int, str, str]:
    """Run the command line as a process; return its exit code, and what it printed."""
    done = python("-m", "asyncloader", *arguments)
    return done.returncode, done.stdout, done.stderr
