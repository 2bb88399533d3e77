"""Decides what to read, before anything is read. No I/O, no `await`, no torch."""

from ._choice import Choice, choose
from ._hints import did_you_mean
from ._layout import (
    PlacedBlock,
    ShardLayout,
    WriteBlock,
    checked_blocks,
    lay_out,
    lay_out_shard,
)
from ._load_info import ID, LoadInfo, checked_load_info, default_load_info
from ._plan import LoadPlan, PartLoad, TableLoad
from ._planner import plan_load
from ._reads import GAP, Extent, Extents, Piece, Read, plan_reads
from ._targets import RowType, TableTarget, Targets, TensorTarget, TensorTargets
from ._tensor_loads import TensorLoad, TensorLoads

__all__ = [
    "GAP",
    "ID",
    "Choice",
    "Extent",
    "Extents",
    "LoadInfo",
    "LoadPlan",
    "PartLoad",
    "Piece",
    "PlacedBlock",
    "Read",
    "RowType",
    "ShardLayout",
    "TableLoad",
    "TableTarget",
    "Targets",
    "TensorLoad",
    "TensorLoads",
    "TensorTarget",
    "TensorTargets",
    "WriteBlock",
    "checked_blocks",
    "checked_load_info",
    "choose",
    "default_load_info",
    "did_you_mean",
    "lay_out",
    "lay_out_shard",
    "plan_load",
    "plan_reads",
]
