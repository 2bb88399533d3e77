"""The hash table: ids → rows, with updates that show all at once."""

from ._hashtable import HashTable
from ._protocol import (
    LoadableTable,
    LoadableUpdate,
    SavableSnapshot,
    SavableTable,
    UpdateCounts,
)
from ._slots import Initializer, Slot
from ._snapshot import SortedRows

__all__ = [
    "HashTable",
    "Initializer",
    "LoadableTable",
    "LoadableUpdate",
    "SavableSnapshot",
    "SavableTable",
    "Slot",
    "SortedRows",
    "UpdateCounts",
]
