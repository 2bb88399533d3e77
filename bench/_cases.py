"""What is loaded: checkpoints, their truth, and the destinations."""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import torch

from asyncloader import Loader, ReadOptions, Saver, gen_slice
from bench._formats import files_of
from bench._raw import shards, size_of
from bench._truth import SEED, holds_exactly, same_bits, windows
from examples.made_up import empty_table
from tests.oracle import TableData, write_checkpoint

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from torch import Tensor

    from asyncloader import HashTable, Slice
    from bench._scale import Scale

TABLE = "emb"
QUARTER = gen_slice(0, 4)
POISON = 0xA5


@dataclass(frozen=True, slots=True)
class DenseCase:
    """A checkpoint of dense tensors, and what it holds."""

    path: Path
    truth: dict[str, Tensor]

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.truth.values())

    def files(self, suffix: str = "safetensors") -> list[Path]:
        """Return its files, or those of the same tensors in another format."""
        return files_of(self.path, suffix, self.truth)

    def destination(self) -> dict[str, Tensor]:
        """Return tensors whose memory is there already."""
        return {name: torch.ones(tensor.shape) for name, tensor in self.truth.items()}

    def check(self, tensors: Mapping[str, Tensor]) -> None:
        assert tensors.keys() == self.truth.keys()
        for name, tensor in self.truth.items():
            assert same_bits(tensors[name], tensor), name


@dataclass(frozen=True, slots=True)
class TableCase:
    """A checkpoint of one table, and the rows that are to come out."""

    path: Path
    truth: TableData
    part: Slice | None = None

    @property
    def nbytes(self) -> int:
        """Of the files, all slices."""
        return size_of(shards(self.path))

    def table(self) -> HashTable:
        return empty_table(TABLE, self.truth, self.part)

    def check(self, table: HashTable) -> None:
        assert holds_exactly(table, self.truth)

    def full_table(self) -> HashTable:
        """Return a table that is loaded already."""
        table = self.table()
        Loader(self.path, {TABLE: table}).load()
        return table

    def owned(self, part: Slice) -> TableCase:
        """Return the same checkpoint, to be loaded by one of several ranks."""
        position = self.truth.ids.numpy().view(np.uint64) % np.uint64(part.size)
        inside = (position >= np.uint64(part.begin)) & (position < np.uint64(part.end))
        return replace(self, truth=rows_at(self.truth, np.flatnonzero(inside)), part=part)


def rows_at(data: TableData, rows: np.ndarray[tuple[int], np.dtype[np.int64]]) -> TableData:
    """Return some of a table's rows."""
    chosen = torch.from_numpy(rows)
    return TableData(
        ids=data.ids[chosen], slots={name: slot[chosen] for name, slot in data.slots.items()}
    )


def poison(tensors: Mapping[str, Tensor]) -> None:
    """Overwrite tensors, so that what is in them afterwards has come from somewhere."""
    for tensor in tensors.values():
        tensor.view(-1).view(torch.uint8).fill_(POISON)


def dense_shapes(scale: Scale) -> dict[str, tuple[int, ...]]:
    return {f"tensor.{number}": (scale.side, scale.side) for number in range(scale.tensors)}


def small_shapes(scale: Scale) -> dict[str, tuple[int, ...]]:
    return {f"tensor.{number}": (1024,) for number in range(scale.small_tensors)}


def dense_case(path: Path, shapes: dict[str, tuple[int, ...]], *, writers: int) -> DenseCase:
    """Return a checkpoint of dense tensors; write it unless it is there."""
    truth = windows(shapes)
    if not (path / "index").exists():
        write_checkpoint(path, {}, truth, writers=writers)
        os.sync()  # writing it back later would compete with what is measured
    return DenseCase(path, truth)


def table_case(path: Path, truth: TableData, *, ranks: int) -> TableCase:
    """Return a checkpoint of one table in four shards, shuffled; write it unless it is there."""
    if not (path / "index").exists():
        write_checkpoint(
            path, {TABLE: truth}, {}, ranks=ranks, writers=4 // ranks, shuffle_seed=SEED
        )
        os.sync()
    return TableCase(path, truth)


def saved_case(path: Path, source: TableCase, *, ranks: int) -> TableCase:
    """Return a checkpoint as our own `Saver` writes it: sorted, four shards in all."""
    if not (path / "index").exists():
        shutil.rmtree(path, ignore_errors=True)
        for rank in reversed(range(ranks)):  # rank 0 waits for the others, and commits
            table = replace(source, part=gen_slice(rank, ranks)).full_table()
            Saver(rank, ranks, 4 // ranks, path, {TABLE: table}, save_id="bench").save()
        os.sync()
    return TableCase(path, source.truth)


def table_loader(path: Path, table: HashTable) -> Loader:
    return Loader(path, hashtables={TABLE: table}, strict=True)


def tensor_loader(
    path: Path, tensors: dict[str, Tensor], *, direct_io: bool | None = None
) -> Loader:
    how = ReadOptions() if direct_io is None else ReadOptions(direct_io=direct_io)
    return Loader(path, tensors=tensors, strict=True, options=how)
