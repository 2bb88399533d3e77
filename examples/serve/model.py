"""What is served: two hash tables, and a tower of two layers on top of them.

All of it is made up from the number of the version and exact in float32: values are multiples of
1/8 between -1 and 1, so sums of their products are the same in whatever order they are added up.
Whoever knows the version of an answer can work out what it has to be, to the last bit.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from asyncloader import DiskTable, HashTable

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch import Tensor

    from asyncloader import Model, Runtime

__all__ = [
    "TABLES",
    "build",
    "build_on_disk",
    "check",
    "expected",
    "fill",
    "name_of",
    "number_of",
    "rank",
    "tower",
]

TABLES = ("user_emb", "item_emb")
WIDTH = 32
HIDDEN = 16


def name_of(version: int) -> str:
    """Return the name of a version's folder."""
    return f"v{version}"


def number_of(name: str) -> int:
    """Return the number of the version in a folder of that name."""
    return int(name.removeprefix("v"))


def build() -> tuple[dict[str, HashTable], dict[str, Tensor]]:
    """Return what a version is loaded into: empty tables, and room for the tower's weights."""
    return {name: HashTable([WIDTH], name=name) for name in TABLES}, _zeros()


def build_on_disk(runtime: Runtime) -> tuple[dict[str, DiskTable], dict[str, Tensor]]:
    """Do as `build`, with tables whose rows stay on the disk; versions share a runtime's cache."""
    return {name: DiskTable([WIDTH], name=name, runtime=runtime) for name in TABLES}, _zeros()


async def check(model: Model) -> None:
    """Keep a version from serving that has no rows, or whose scores are no numbers."""
    for name, table in model.tables.items():
        if not len(table):
            raise ValueError(f"{name} is empty")
    scores = await rank(model, user=0, items=range(8))
    if not bool(scores.isfinite().all()):
        raise ValueError(f"scores are not finite: {scores.tolist()}")


async def rank(model: Model, *, user: int, items: Sequence[int]) -> Tensor:
    """Return a user's score of each item, `[items]`. Ids that are not there have a row of zeros."""
    users = await model.tables["user_emb"].alookup(torch.tensor([user]))
    rows = await model.tables["item_emb"].alookup(torch.tensor(items, dtype=torch.int64))
    return score(model.tensors, users, rows)


def score(tensors: Mapping[str, Tensor], user: Tensor, items: Tensor) -> Tensor:
    """Run the tower over a user's row, `[1, WIDTH]`, and those of items, `[items, WIDTH]`."""
    features = torch.cat([user.expand(len(items), -1), items], dim=1)
    hidden = torch.relu(features @ tensors["tower.0.weight"].T + tensors["tower.0.bias"])
    return (hidden @ tensors["tower.2.weight"].T + tensors["tower.2.bias"])[:, 0]


# How versions are made up


def tower(version: int) -> dict[str, Tensor]:
    """Return the tower's weights. Its last bias is the number of the version."""
    made = {
        name: _values(version, 2 + salt, torch.arange(len(zeros)), zeros.numel() // len(zeros))
        for salt, (name, zeros) in enumerate(_zeros().items())
    }
    made["tower.2.bias"].fill_(version)
    return {name: made[name].reshape(zeros.shape) for name, zeros in _zeros().items()}


def fill(tables: Mapping[str, HashTable], version: int, ids: range) -> None:
    """Give ids the rows of a version. Takes eight times their room meanwhile: hand it some."""
    some = torch.arange(ids.start, ids.stop)
    for salt, name in enumerate(TABLES):
        tables[name].insert(some, _values(version, salt, some, WIDTH))


def expected(version: int, *, user: int, items: Sequence[int]) -> list[float]:
    """Return the scores that a version gives ids which it has."""
    users = _values(version, 0, torch.tensor([user]), WIDTH)
    rows = _values(version, 1, torch.tensor(items), WIDTH)
    scores: list[float] = score(tower(version), users, rows).tolist()
    return scores


def _zeros() -> dict[str, Tensor]:
    return {
        "tower.0.weight": torch.zeros(HIDDEN, 2 * WIDTH),
        "tower.0.bias": torch.zeros(HIDDEN),
        "tower.2.weight": torch.zeros(1, HIDDEN),
        "tower.2.bias": torch.zeros(1),
    }


def _values(version: int, salt: int, rows: Tensor, width: int) -> Tensor:
    """Return float32 `[rows, width]`, each a hash of its place and version, in eighths."""
    place = rows[:, None] * 0x9E3779B1 + torch.arange(width) * 0x85EBCA6B
    mixed = (place + (version * 8 + salt) * 0xC2B2AE35) * 0x2C1B3C6D
    return (((mixed ^ (mixed >> 29)) >> 8) % 17 - 8).float() / 8
