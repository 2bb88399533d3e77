"""The hash table: ids → rows, with updates that show all at once."""

from ._hashtable import HashTable
from ._protocol import LoadableTable, LoadableUpdate, UpdateCounts
from ._slots import Initializer, Slot

__all__ = ["HashTable", "Initializer", "LoadableTable", "LoadableUpdate", "Slot", "UpdateCounts"]
