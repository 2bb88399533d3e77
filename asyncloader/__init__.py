"""Streams recommendation-model checkpoints into tensors and hash tables, on asyncio."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ._checkpoint.slices import Slice, gen_slice
    from ._loading.progress import Progress, Span
    from ._loading.report import LoadReport
    from ._loading.runtime import Runtime
    from ._planning.casts import Cast
    from ._planning.plan import LoadPlan
    from ._saving.layout import WriteBlock
    from ._saving.report import SaveReport
    from ._serving.events import (
        Event,
        Freed,
        LoadCancelled,
        LoadFailed,
        LoadFinished,
        LoadStarted,
        RolledBack,
        Swapped,
        VersionRefused,
    )
    from ._serving.model import Model
    from ._serving.state import LiveState, LiveVersion
    from ._table.hashtable import HashTable
    from ._table.protocol import UpdateCounts
    from ._table.slots import Slot
    from ._threads.lag import LoopLag
    from ._tools.converting.convert import Conversion
    from ._tools.diffing.difference import Difference
    from ._tools.folders import RunSummary
    from ._tools.summary import CheckpointSummary
    from ._tools.verifying.findings import Verification
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
    from .live import Live
    from .loader import Loader
    from .model import targets
    from .options import ReadOptions
    from .reader import CheckpointReader, aload_tensors, load_tensors
    from .runs import alatest, latest
    from .saver import Saver
    from .tools import (
        aconvert,
        adiff,
        aempty_like,
        ainspect,
        averify,
        convert,
        diff,
        empty_like,
        inspect,
        verify,
    )

__version__ = "0.1.0"

__all__ = [
    "AsyncLoaderError",
    "Cast",
    "CheckpointChangedError",
    "CheckpointError",
    "CheckpointNotFoundError",
    "CheckpointReader",
    "CheckpointSummary",
    "Conversion",
    "Difference",
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
    "ReadOptions",
    "ReadStalledError",
    "RolledBack",
    "RunSummary",
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
    "Verification",
    "VersionRefused",
    "WriteBlock",
    "__version__",
    "aconvert",
    "adiff",
    "aempty_like",
    "ainspect",
    "alatest",
    "aload_tensors",
    "averify",
    "convert",
    "diff",
    "empty_like",
    "gen_slice",
    "inspect",
    "latest",
    "load_tensors",
    "targets",
    "verify",
]

# Imported when somebody asks for them: torch takes seconds, and many commands do without.
_MODULES = {
    "_checkpoint.slices": "Slice gen_slice",
    "_loading.progress": "Progress Span",
    "_loading.report": "LoadReport",
    "_loading.runtime": "Runtime",
    "_planning.casts": "Cast",
    "_planning.plan": "LoadPlan",
    "_saving.layout": "WriteBlock",
    "_saving.report": "SaveReport",
    "_serving.events": (
        "Event Freed LoadCancelled LoadFailed LoadFinished "
        "LoadStarted RolledBack Swapped VersionRefused"
    ),
    "_serving.model": "Model",
    "_serving.state": "LiveState LiveVersion",
    "_table.hashtable": "HashTable",
    "_table.protocol": "UpdateCounts",
    "_table.slots": "Slot",
    "_threads.lag": "LoopLag",
    "_tools.converting.convert": "Conversion",
    "_tools.diffing.difference": "Difference",
    "_tools.folders": "RunSummary",
    "_tools.summary": "CheckpointSummary",
    "_tools.verifying.findings": "Verification",
    "errors": (
        "AsyncLoaderError CheckpointChangedError CheckpointError CheckpointNotFoundError "
        "LoadTimeoutError PlanError ReadError ReadStalledError "
        "SaveError SaveTimeoutError TruncatedShardError"
    ),
    "live": "Live",
    "loader": "Loader",
    "model": "targets",
    "options": "ReadOptions",
    "reader": "CheckpointReader aload_tensors load_tensors",
    "runs": "alatest latest",
    "saver": "Saver",
    "tools": ("aconvert adiff aempty_like ainspect averify convert diff empty_like inspect verify"),
}
_MODULE_OF = {name: module for module, names in _MODULES.items() for name in names.split()}


def __getattr__(name: str) -> object:
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value: object = getattr(import_module(f".{_MODULE_OF[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_MODULE_OF})
