"""Carries plans out: byte budget, readers, sinks."""

from ._blocking import run_blocking
from ._budget import ByteBudget
from ._execution import Execution
from ._progress import Meter, Progress
from ._tables import check_tables, describe_tables
from ._tensors import describe_tensors, overlaps
from ._threads import Threads

__all__ = [
    "ByteBudget",
    "Execution",
    "Meter",
    "Progress",
    "Threads",
    "check_tables",
    "describe_tables",
    "describe_tensors",
    "overlaps",
    "run_blocking",
]
