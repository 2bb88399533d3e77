"""Carries saves out: gathers rows, writes shards, makes a checkpoint of what ranks have written."""

from ._commit import Commit
from ._contents import Contents
from ._layout import (
    PlacedBlock,
    ShardLayout,
    WriteBlock,
    checked_blocks,
    lay_out,
    lay_out_shard,
)
from ._part import RankPart
from ._save import Save
from ._save_id import Agreed, checked_save_id, fresh_save_id, shared_save_id
from ._writing import CHUNK, Means

__all__ = [
    "CHUNK",
    "Agreed",
    "Commit",
    "Contents",
    "Means",
    "PlacedBlock",
    "RankPart",
    "Save",
    "ShardLayout",
    "WriteBlock",
    "checked_blocks",
    "checked_save_id",
    "fresh_save_id",
    "lay_out",
    "lay_out_shard",
    "shared_save_id",
]
