"""Decides what to read, before anything is read. No I/O, no `await`, no torch."""

from ._casts import Cast, Casting, can_cast, checked_cast
from ._choice import Choice, choose
from ._hints import RENAME, did_you_mean
from ._load_info import ID, LoadInfo, checked_load_info, default_load_info
from ._plan import LoadPlan, PartLoad, TableLoad
from ._planner import plan_load
from ._reads import GAP, Extent, Extents, Piece, Read, plan_reads
from ._targets import RowType, TableTarget, Targets, TensorTarget, TensorTargets
from ._tensor_loads import TensorLoad, TensorLoads

__all__ = [
    "GAP",
    "ID",
    "RENAME",
    "Cast",
    "Casting",
    "Choice",
    "Extent",
    "Extents",
    "LoadInfo",
    "LoadPlan",
    "PartLoad",
    "Piece",
    "Read",
    "RowType",
    "TableLoad",
    "TableTarget",
    "Targets",
    "TensorLoad",
    "TensorLoads",
    "TensorTarget",
    "TensorTargets",
    "can_cast",
    "checked_cast",
    "checked_load_info",
    "choose",
    "default_load_info",
    "did_you_mean",
    "plan_load",
    "plan_reads",
]
