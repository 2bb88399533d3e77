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
from ._plan import LoadPlan, PartLoad, TableLoad, TensorLoad
from ._planner import plan_load
from ._reads import GAP, Extent, Piece, Read, plan_reads
from ._targets import RowType, TableTarget, Targets, TensorTarget

__all__ = [
    "GAP",
    "ID",
    "Choice",
    "Extent",
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
    "TensorTarget",
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
