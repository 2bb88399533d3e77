"""How much memory a version will take."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from asyncloader.planning import LoadPlan
    from asyncloader.table import HashTable

    from ._model import Model

__all__ = ["predicted_bytes"]

# The id itself, and two words of the index, which begins half full.
_ID_BYTES = 8 + 16


def predicted_bytes(plan: LoadPlan, model: Model) -> int:
    """Return the bytes that a model takes once a plan is carried out.

    Tensors that share memory count once. Rows of tables are an estimate where the checkpoint was
    written by another number of ranks.
    """
    storages = {
        (storage.device, storage.data_ptr()): storage.nbytes()
        for storage in (tensor.untyped_storage() for tensor in model.tensors.values())
    }
    rows = sum(
        load.expected * (_ID_BYTES + _row_bytes(model.tables[load.name])) for load in plan.tables
    )
    return sum(storages.values()) + rows


def _row_bytes(table: HashTable) -> int:
    return sum(math.prod(slot.shape) * slot.dtype.itemsize for slot in table.slots().values())
