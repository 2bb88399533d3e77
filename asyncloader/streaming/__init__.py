"""Carries plans out: byte budget, readers, sinks."""

from ._blocking import run_blocking
from ._budget import ByteBudget
from ._claims import Claim
from ._destinations import Destinations, describe_tensors
from ._execution import CHANGED, Execution, check_unchanged
from ._kinds import check_tensors
from ._lag import LagWatch, LoopLag
from ._progress import Meter, Progress
from ._staging import Arena, StagingPool
from ._tables import check_tables, describe_tables
from ._tensors import copy_elements, plain_bytes
from ._threads import Threads
from ._trace import Span, Tracer
from ._verification import Verifier

__all__ = [
    "CHANGED",
    "Arena",
    "ByteBudget",
    "Claim",
    "Destinations",
    "Execution",
    "LagWatch",
    "LoopLag",
    "Meter",
    "Progress",
    "Span",
    "StagingPool",
    "Threads",
    "Tracer",
    "Verifier",
    "check_tables",
    "check_tensors",
    "check_unchanged",
    "copy_elements",
    "describe_tables",
    "describe_tensors",
    "plain_bytes",
    "run_blocking",
]
