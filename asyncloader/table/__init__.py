"""The hash table: ids → rows, with updates that show all at once. Savers use `table.snapshot`."""

from ._hashtable import HashTable
from ._protocol import (
    LoadableTable,
    LoadableUpdate,
    SavableSnapshot,
    SavableTable,
    UpdateCounts,
)
from ._slots import Initializer, Slot

__all__ = [
    "HashTable",
    "Initializer",
    "LoadableTable",
    "LoadableUpdate",
    "SavableSnapshot",
    "SavableTable",
    "Slot",
    "UpdateCounts",
]
