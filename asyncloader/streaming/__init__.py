"""Carries plans out: byte budget, readers, sinks."""

from ._blocking import run_blocking
from ._budget import ByteBudget
from ._execution import Execution
from ._progress import Meter, Progress
from ._tensors import describe, overlaps
from ._threads import Threads

__all__ = [
    "ByteBudget",
    "Execution",
    "Meter",
    "Progress",
    "Threads",
    "describe",
    "overlaps",
    "run_blocking",
]
