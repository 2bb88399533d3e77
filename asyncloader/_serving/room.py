"""How much memory a version will take."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from asyncloader._planning.plan import LoadPlan
    from asyncloader._table.hashtable import HashTable

    from .model import Model


# The id itself, and two words of the index, which begins half full.
_ID_BYTES = 8 + 16


def tensor_bytes(model: Model) -> int:
    """Return the bytes that a model's tensors take; those that share memory count once."""
    storages = {
        (storage.device, storage.data_ptr()): storage.nbytes()
        for storage in (tensor.untyped_storage() for tensor in model.tensors.values())
    }
    return sum(storages.values())


def row_bytes(plan: LoadPlan, model: Model) -> int:
    """Return the bytes that a model's tables take once a plan is carried out.

    An estimate where the checkpoint was written by another number of ranks.
    """
    return sum(
        load.expected * (_ID_BYTES + _per_row(model.tables[load.name])) for load in plan.tables
    )


def _per_row(table: HashTable) -> int:
    return sum(math.prod(slot.shape) * slot.dtype.itemsize for slot in table.slots().values())
