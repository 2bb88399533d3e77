"""Streams recommendation-model checkpoints into tensors and hash tables, on asyncio."""

from ._report import LoadReport
from .checkpoint import Slice, gen_slice
from .errors import (
    AsyncLoaderError,
    CheckpointError,
    CheckpointNotFoundError,
    LoadTimeoutError,
    PlanError,
    ReadError,
    TruncatedShardError,
)
from .loader import Loader
from .planning import LoadPlan
from .streaming import Progress
from .table import HashTable, Slot, UpdateCounts

__version__ = "0.1.0"

__all__ = [
    "AsyncLoaderError",
    "CheckpointError",
    "CheckpointNotFoundError",
    "HashTable",
    "LoadPlan",
    "LoadReport",
    "LoadTimeoutError",
    "Loader",
    "PlanError",
    "Progress",
    "ReadError",
    "Slice",
    "Slot",
    "TruncatedShardError",
    "UpdateCounts",
    "__version__",
    "gen_slice",
]
