"""What `asyncloader diff` does: says how two checkpoints differ."""

from ._comparison import Change
from ._diff import BUDGET, adiff
from ._difference import (
    Difference,
    Kind,
    Names,
    SlotDifference,
    TableDifference,
    TensorDifference,
)

__all__ = [
    "BUDGET",
    "Change",
    "Difference",
    "Kind",
    "Names",
    "SlotDifference",
    "TableDifference",
    "TensorDifference",
    "adiff",
]
