"""What is loaded: checkpoints, their truth, and the destinations, full-size or tiny."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from asyncloader import Loader, gen_slice
from examples.made_up import (
    empty_table,
    holds_exactly,
    random_table,
    random_tensor,
    same_bits,
)
from tests.oracle import TableData, write_checkpoint

if TYPE_CHECKING:
    from pathlib import Path

    from asyncloader import HashTable, Slice

TABLE = "emb"
QUARTER = gen_slice(0, 4)
SEED = 7


@dataclass(frozen=True, slots=True, kw_only=True)
class Scale:
    """How large the checkpoints are."""

    name: str
    tensors: int
    side: int
    """Each tensor is `[side, side]` float32."""

    small_tensors: int
    """Of 4 KiB."""

    ids: int
    width: int


FULL = Scale(name="full", tensors=128, side=2048, small_tensors=20_000, ids=4_000_000, width=32)
TINY = Scale(name="tiny", tensors=32, side=64, small_tensors=200, ids=20_000, width=32)
SCALES = {scale.name: scale for scale in (FULL, TINY)}


@dataclass(frozen=True, slots=True)
class DenseCase:
    """A checkpoint of dense tensors, and what it holds."""

    path: Path
    truth: dict[str, torch.Tensor]

    def check(self, tensors: dict[str, torch.Tensor]) -> None:
        for name, tensor in self.truth.items():
            assert same_bits(tensors[name], tensor), name


@dataclass(frozen=True, slots=True)
class TableCase:
    """A checkpoint of one table, and the rows that are to come out."""

    path: Path
    truth: TableData
    part: Slice | None = None

    def table(self) -> HashTable:
        return empty_table(TABLE, self.truth, self.part)

    def check(self, table: HashTable) -> None:
        assert holds_exactly(table, self.truth)


def dense_shapes(scale: Scale) -> dict[str, tuple[int, ...]]:
    return {f"tensor.{number}": (scale.side, scale.side) for number in range(scale.tensors)}


def small_shapes(scale: Scale) -> dict[str, tuple[int, ...]]:
    return {f"tensor.{number}": (1024,) for number in range(scale.small_tensors)}


def touched(shapes: dict[str, tuple[int, ...]]) -> dict[str, torch.Tensor]:
    """Return tensors whose memory is there already."""
    return {name: torch.ones(shape) for name, shape in shapes.items()}


def dense_case(path: Path, shapes: dict[str, tuple[int, ...]]) -> DenseCase:
    """Return a checkpoint of dense tensors in 16 shards; write it unless it is there."""
    rng = np.random.default_rng(SEED)
    truth = {name: random_tensor(rng, shape) for name, shape in shapes.items()}
    if not (path / "index").exists():
        write_checkpoint(path, {}, truth, writers=16)
        os.sync()  # writing it back later would compete with what is measured
    return DenseCase(path, truth)


def table_truth(scale: Scale) -> TableData:
    return random_table(np.random.default_rng(SEED), scale.ids, scale.width)


def table_case(path: Path, truth: TableData, *, ranks: int) -> TableCase:
    """Return a checkpoint of one table in four shards, shuffled; write it unless it is there."""
    if not (path / "index").exists():
        write_checkpoint(
            path, {TABLE: truth}, {}, ranks=ranks, writers=4 // ranks, shuffle_seed=SEED
        )
        os.sync()
    return TableCase(path, truth)


def quarter_of(case: TableCase) -> TableCase:
    """Return the same checkpoint, to be loaded by one of four ranks."""
    position = case.truth.ids.numpy().view(np.uint64) % np.uint64(QUARTER.size)
    mine = torch.from_numpy(np.flatnonzero(position < np.uint64(QUARTER.end)))
    truth = TableData(
        ids=case.truth.ids[mine],
        slots={slot: rows[mine] for slot, rows in case.truth.slots.items()},
    )
    return TableCase(case.path, truth, QUARTER)


def table_loader(path: Path, table: HashTable) -> Loader:
    return Loader(path, hashtables={TABLE: table}, strict=True)


def tensor_loader(path: Path, tensors: dict[str, torch.Tensor]) -> Loader:
    return Loader(path, tensors=tensors, strict=True)
