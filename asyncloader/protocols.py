"""Protocols that users may implement: storages to read from, tables to load into and to save."""

from __future__ import annotations

from ._storage.protocol import ReadInto, Storage, ThreadedStorage
from ._table.protocol import (
    LoadableTable,
    LoadableUpdate,
    LocatingUpdate,
    Placed,
    PlacingUpdate,
    SavableSnapshot,
    SavableTable,
    UpdateCounts,
)

__all__ = [
    "LoadableTable",
    "LoadableUpdate",
    "LocatingUpdate",
    "Placed",
    "PlacingUpdate",
    "ReadInto",
    "SavableSnapshot",
    "SavableTable",
    "Storage",
    "ThreadedStorage",
    "UpdateCounts",
]
