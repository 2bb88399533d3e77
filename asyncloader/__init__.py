"""Streams recommendation-model checkpoints into tensors and hash tables, on asyncio."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ._checkpoint.slices import Slice as Slice, gen_slice as gen_slice
    from ._disk_table.stats import TableStats as TableStats
    from ._disk_table.table import DiskTable as DiskTable
    from ._loading.progress import Progress as Progress, Span as Span
    from ._loading.report import LoadReport as LoadReport
    from ._loading.runtime import Runtime as Runtime
    from ._planning.origins import Origin as Origin, Resolution as Resolution
    from ._planning.plan import LoadPlan as LoadPlan
    from ._planning.targets import Cast as Cast
    from ._saving.layout import WriteBlock as WriteBlock
    from ._saving.report import SaveReport as SaveReport
    from ._serving.events import (
        Event as Event,
        Freed as Freed,
        LiveState as LiveState,
        LiveVersion as LiveVersion,
        LoadCancelled as LoadCancelled,
        LoadFailed as LoadFailed,
        LoadFinished as LoadFinished,
        LoadStarted as LoadStarted,
        RolledBack as RolledBack,
        Swapped as Swapped,
        VersionRefused as VersionRefused,
    )
    from ._serving.model import Model as Model
    from ._table.hashtable import HashTable as HashTable
    from ._table.protocol import UpdateCounts as UpdateCounts
    from ._table.recis import RecISTable as RecISTable
    from ._table.schema import Slot as Slot
    from ._threads.lag import LoopLag as LoopLag
    from ._tools.converting import Conversion as Conversion
    from ._tools.difference import Difference as Difference
    from ._tools.inspecting import CheckpointSummary as CheckpointSummary
    from ._tools.run_summary import RunSummary as RunSummary
    from ._tools.verifying import Verification as Verification
    from .disk import open_table as open_table
    from .errors import (
        AsyncLoaderError as AsyncLoaderError,
        CheckpointChangedError as CheckpointChangedError,
        CheckpointError as CheckpointError,
        CheckpointNotFoundError as CheckpointNotFoundError,
        LoadTimeoutError as LoadTimeoutError,
        PlanError as PlanError,
        ReadError as ReadError,
        ReadStalledError as ReadStalledError,
        SaveError as SaveError,
        SaveTimeoutError as SaveTimeoutError,
        TruncatedShardError as TruncatedShardError,
    )
    from .extra import (
        aread_extra as aread_extra,
        aread_io_state as aread_io_state,
        read_extra as read_extra,
        read_io_state as read_io_state,
    )
    from .live import Live as Live
    from .loader import Loader as Loader
    from .model import targets as targets
    from .options import ReadOptions as ReadOptions
    from .reader import (
        CheckpointReader as CheckpointReader,
        aload_tensors as aload_tensors,
        load_tensors as load_tensors,
    )
    from .runs import alatest as alatest, latest as latest
    from .saver import Saver as Saver
    from .tools import (
        aconvert as aconvert,
        adiff as adiff,
        aempty_like as aempty_like,
        ainspect as ainspect,
        averify as averify,
        convert as convert,
        diff as diff,
        empty_like as empty_like,
        inspect as inspect,
        verify as verify,
    )

__version__ = "0.1.0"

# A name is imported when it is first used: torch takes seconds, and many commands do without.
_MODULES = {
    "_checkpoint.slices": "Slice gen_slice",
    "_disk_table.stats": "TableStats",
    "_disk_table.table": "DiskTable",
    "_loading.progress": "Progress Span",
    "_loading.report": "LoadReport",
    "_loading.runtime": "Runtime",
    "_planning.origins": "Origin Resolution",
    "_planning.plan": "LoadPlan",
    "_planning.targets": "Cast",
    "_saving.layout": "WriteBlock",
    "_saving.report": "SaveReport",
    "_serving.events": (
        "Event Freed LiveState LiveVersion LoadCancelled LoadFailed LoadFinished "
        "LoadStarted RolledBack Swapped VersionRefused"
    ),
    "_serving.model": "Model",
    "_table.hashtable": "HashTable",
    "_table.protocol": "UpdateCounts",
    "_table.recis": "RecISTable",
    "_table.schema": "Slot",
    "_threads.lag": "LoopLag",
    "_tools.converting": "Conversion",
    "_tools.difference": "Difference",
    "_tools.inspecting": "CheckpointSummary",
    "_tools.run_summary": "RunSummary",
    "_tools.verifying": "Verification",
    "disk": "open_table",
    "errors": (
        "AsyncLoaderError CheckpointChangedError CheckpointError CheckpointNotFoundError "
        "LoadTimeoutError PlanError ReadError ReadStalledError "
        "SaveError SaveTimeoutError TruncatedShardError"
    ),
    "extra": "aread_extra aread_io_state read_extra read_io_state",
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

if not TYPE_CHECKING:  # type checkers, which cannot read this, have the imports above
    __all__ = ["__version__", *_MODULE_OF]  # noqa: PLE0604  # all of it is text


def __getattr__(name: str) -> object:
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value: object = getattr(import_module(f".{_MODULE_OF[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_MODULE_OF})
