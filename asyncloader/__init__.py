"""Streams recommendation-model checkpoints into tensors and hash tables, on asyncio."""

from ._load_tensors import aload_tensors, load_tensors
from ._model import targets
from ._report import LoadReport
from ._runs import latest
from ._save_report import SaveReport
from .checkpoint import Slice, gen_slice
from .errors import (
    AsyncLoaderError,
    CheckpointChangedError,
    CheckpointError,
    CheckpointNotFoundError,
    LoadTimeoutError,
    PlanError,
    ReadError,
    SaveError,
    SaveTimeoutError,
    TruncatedShardError,
)
from .loader import Loader
from .planning import LoadPlan, WriteBlock
from .reader import CheckpointReader
from .saver import Saver
from .streaming import Progress, Span
from .table import HashTable, Slot, UpdateCounts

__version__ = "0.1.0"

__all__ = [
    "AsyncLoaderError",
    "CheckpointChangedError",
    "CheckpointError",
    "CheckpointNotFoundError",
    "CheckpointReader",
    "HashTable",
    "LoadPlan",
    "LoadReport",
    "LoadTimeoutError",
    "Loader",
    "PlanError",
    "Progress",
    "ReadError",
    "SaveError",
    "SaveReport",
    "SaveTimeoutError",
    "Saver",
    "Slice",
    "Slot",
    "Span",
    "TruncatedShardError",
    "UpdateCounts",
    "WriteBlock",
    "__version__",
    "aload_tensors",
    "gen_slice",
    "latest",
    "load_tensors",
    "targets",
]
