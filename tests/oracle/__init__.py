"""An independent writer, reader and loading model of RecIS checkpoints, for tests.

Written from the format's description alone. Nothing in here may import `asyncloader`.
"""

from __future__ import annotations

from .faults import (
    append,
    declare_header_length,
    edit_header,
    edit_json,
    shard_header,
    shard_holding,
    truncate,
)
from .model import ModelTable, Outcome, encode_id, rows_of
from .reader import read_checkpoint, read_parts
from .shard import Block, Rows, write_shard
from .values import DTYPES, Part, Slice, TableData, flat_bytes, split_slices
from .writer import dense_block, shard_name, sparse_block, write_checkpoint, write_ranks

__all__ = [
    "DTYPES",
    "Block",
    "ModelTable",
    "Outcome",
    "Part",
    "Rows",
    "Slice",
    "TableData",
    "append",
    "declare_header_length",
    "dense_block",
    "edit_header",
    "edit_json",
    "encode_id",
    "flat_bytes",
    "read_checkpoint",
    "read_parts",
    "rows_of",
    "shard_header",
    "shard_holding",
    "shard_name",
    "sparse_block",
    "split_slices",
    "truncate",
    "write_checkpoint",
    "write_ranks",
    "write_shard",
]
