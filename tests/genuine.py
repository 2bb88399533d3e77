"""A run folder that RecIS 1.0.0 itself wrote, and what its trainer had in memory."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from asyncloader import HashTable
from tests.oracle import TableData

if TYPE_CHECKING:
    from torch import Tensor

RUN = Path(__file__).parent / "data" / "recis_run"
NEWEST = "ckpt_30"
NAMES = ("ckpt_20", NEWEST)


@dataclass(frozen=True, kw_only=True)
class Truth:
    """What a checkpoint of the run holds.

    Attributes:
        tables: By their names on disk; `user` and `shop` were one coalesced table.
        dense: The tensors of `model.pt`.
        scalars: The tensors of the safetensors files.
        extra: Values of `extra.pt`, those of its windows' positions and of its step.
    """

    tables: dict[str, TableData]
    dense: dict[str, Tensor]
    scalars: dict[str, Tensor]
    extra: dict[str, Tensor]

    @property
    def tensors(self) -> dict[str, Tensor]:
        return self.dense | self.scalars

    def destinations(self) -> tuple[dict[str, HashTable], dict[str, Tensor]]:
        """Return empty tables, and tensors of zeros, for all of it."""
        tables = {}
        for name, data in self.tables.items():
            slots = dict(data.slots)
            embedding = slots.pop("embedding")
            table = HashTable(embedding.shape[1:], dtype=embedding.dtype, name=name)
            for slot, rows in slots.items():
                table.add_slot(slot, rows.shape[1:], rows.dtype)
            tables[name] = table
        return tables, {name: torch.zeros_like(held) for name, held in self.tensors.items()}


def truth(name: str = NEWEST) -> Truth:
    held: dict[str, Any] = torch.load(RUN / name / "truth.pt", weights_only=True)
    tables = {
        table: TableData(ids=data["ids"], slots=data["slots"])
        for table, data in held["tables"].items()
    }
    return Truth(tables=tables, dense=held["dense"], scalars=held["scalars"], extra=held["extra"])


def copy_of_run(base: Path) -> Path:
    """Return a copy of the run folder, for a test that changes it."""
    return Path(shutil.copytree(RUN, base / "run"))
