"""Streams recommendation-model checkpoints into tensors and hash tables, on asyncio."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

from ._model import targets
from ._report import LoadReport
from .checkpoint import Slice, gen_slice
from .errors import (
    AsyncLoaderError,
    CheckpointChangedError,
    CheckpointError,
    CheckpointNotFoundError,
    LoadTimeoutError,
    PlanError,
    ReadError,
    ReadStalledError,
    SaveError,
    SaveTimeoutError,
    TruncatedShardError,
)
from .loader import Loader
from .planning import Cast, LoadPlan
from .runtime import Runtime
from .streaming import LoopLag, Progress, Span
from .table import HashTable, Slot, UpdateCounts

if TYPE_CHECKING:
    from ._load_tensors import aload_tensors, load_tensors
    from ._runs import latest
    from ._save_report import SaveReport
    from .live import Live
    from .reader import CheckpointReader
    from .saver import Saver
    from .saving import WriteBlock
    from .serving import (
        Event,
        Freed,
        LiveState,
        LiveVersion,
        LoadCancelled,
        LoadFailed,
        LoadFinished,
        LoadStarted,
        Model,
        RolledBack,
        Swapped,
        VersionRefused,
    )

__version__ = "0.1.0"

__all__ = [
    "AsyncLoaderError",
    "Cast",
    "CheckpointChangedError",
    "CheckpointError",
    "CheckpointNotFoundError",
    "CheckpointReader",
    "Event",
    "Freed",
    "HashTable",
    "Live",
    "LiveState",
    "LiveVersion",
    "LoadCancelled",
    "LoadFailed",
    "LoadFinished",
    "LoadPlan",
    "LoadReport",
    "LoadStarted",
    "LoadTimeoutError",
    "Loader",
    "LoopLag",
    "Model",
    "PlanError",
    "Progress",
    "ReadError",
    "ReadStalledError",
    "RolledBack",
    "Runtime",
    "SaveError",
    "SaveReport",
    "SaveTimeoutError",
    "Saver",
    "Slice",
    "Slot",
    "Span",
    "Swapped",
    "TruncatedShardError",
    "UpdateCounts",
    "VersionRefused",
    "WriteBlock",
    "__version__",
    "aload_tensors",
    "gen_slice",
    "latest",
    "load_tensors",
    "targets",
]

# Imported when they are asked for: who only loads does without, and every class counts.
_LATER = {
    "Live": "live",
    "Event": "serving",
    "Freed": "serving",
    "LiveState": "serving",
    "LiveVersion": "serving",
    "LoadCancelled": "serving",
    "LoadFailed": "serving",
    "LoadFinished": "serving",
    "LoadStarted": "serving",
    "Model": "serving",
    "RolledBack": "serving",
    "Swapped": "serving",
    "VersionRefused": "serving",
    "CheckpointReader": "reader",
    "SaveReport": "_save_report",
    "Saver": "saver",
    "WriteBlock": "saving",
    "aload_tensors": "_load_tensors",
    "latest": "_runs",
    "load_tensors": "_load_tensors",
}


def __getattr__(name: str) -> object:
    if name not in _LATER:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value: object = getattr(import_module(f".{_LATER[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_LATER})
